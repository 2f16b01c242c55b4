"""Every family through two pools: its answers are those of transformers, over prompts longer than any window."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cluster import TinyCheckpoint, local_cluster
from tests.families import FAMILIES

pytestmark = pytest.mark.integration

LENGTHS = (1, 15, 40, 150)  # the last in three chunks
NUM_TOKENS = 24  # over the edge of every window


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_through_two_pools_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    checkpoint = TinyCheckpoint(tmp_path, FAMILIES[name])

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            await asyncio.gather(*(cluster.check_greedy(checkpoint.prompt(length), NUM_TOKENS) for length in LENGTHS))

    asyncio.run(scenario())
