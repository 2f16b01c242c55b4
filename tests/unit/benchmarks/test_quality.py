"""Weights that the quality bench rounds by itself."""

from __future__ import annotations

import torch

from benchmarks.quality import round_in_groups


def test_groups_begin_earlier_and_have_sixteen_steps_each() -> None:
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(5)) + 4.0
    rounded = round_in_groups(weight, 16)
    for row, exact in zip(rounded, weight, strict=True):
        for first, last in ((0, 16), (16, 48), (48, 80), (80, 100)):
            group = exact[first:last]
            step = (group.max() - group.min()) / 15
            assert len(row[first:last].unique()) <= 16
            # Half a step, and what bfloat16 makes of the minimum and of 15 steps.
            allowed = step / 2 + (group.min() + 15 * step) / 256
            assert (row[first:last] - group).abs().max() <= allowed
    assert not torch.equal(rounded, round_in_groups(weight, 0))
