"""Operations on rows of logits, against plain Python over one row."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from workers.model.rows import NONE, index_at, largest, likeliest, padded

SIZES = (1, 5, 255, 256, 257, 300, 512, 1000, 5003)


def noise(num_rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_is_the_first_of_the_largest(size: int, dtype: torch.dtype) -> None:
    rows = (noise(40, size) * 2).round().to(dtype)  # many values are there several times
    expected = [max(range(size), key=row.__getitem__) for row in rows.tolist()]
    assert likeliest(rows) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_no_likeliest(size: int, bad: float) -> None:
    for place in {0, size // 2, size - 1}:
        rows = noise(3, size)
        rows[1, place] = bad
        assert [token == NONE for token in likeliest(rows)] == [False, True, False]


def test_minus_infinity_is_a_value_unless_there_is_no_other() -> None:
    rows = torch.full((2, 300), -torch.inf)
    rows[0, 299] = -5.0
    assert likeliest(rows) == [299, NONE]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 20, 400])
def test_the_largest_few_are_those_of_a_sort(size: int, count: int) -> None:
    rows = noise(5, size)
    values, places = largest(padded(rows), min(count, size))
    for row, found, where in zip(rows.tolist(), values.tolist(), places.tolist(), strict=True):
        assert found == sorted(row, reverse=True)[:count]
        assert [row[place] for place in where] == found


@pytest.mark.parametrize("size", [3, 256, 700])
def test_an_index_is_drawn_as_often_as_it_weighs(size: int) -> None:
    weights = torch.rand(1, size, generator=torch.Generator().manual_seed(1))
    weights[0, ::3] = 0.0
    row = torch.zeros(1, padded(weights).shape[1])
    row[0, :size] = weights
    fractions = torch.arange(20_000, dtype=torch.float64) / 20_000
    counts = Counter(index_at(row.expand(20_000, -1), fractions).tolist())
    total = float(weights.double().sum())
    for place, weight in enumerate(weights[0].tolist()):
        assert abs(counts[place] - 20_000 * weight / total) < 2.01  # an even comb: one more or less at each end


def test_the_ends_of_the_scale_give_weights_above_zero() -> None:
    row = torch.zeros(2, 1024)
    row[:, 300], row[:, 700] = 1e-30, 1.0
    assert index_at(row, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)).tolist() == [300, 700]
