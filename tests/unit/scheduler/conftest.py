"""Engines whose caches are checked for leaks when the test is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from scheduler.batching import BatchLimits
from tests.unit.scheduler.engine import Engine

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Blocks hold four tokens."""
    engines: list[Engine] = []

    def make(
        num_blocks: int = 32,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        waiting: int = 16,
        *,
        prefix_caching: bool = True,
    ) -> Engine:
        limits = BatchLimits(max_num_seqs, max_num_batched_tokens, waiting)
        engines.append(Engine(num_blocks, limits, prefix_caching=prefix_caching))
        return engines[-1]

    yield make
    for engine in engines:
        engine.end()
