"""Every family through two pools: its answers are those of transformers, over prompts longer than any window."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster import LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.families import FAMILIES
from tests.logprobs import check_all_logprobs

pytestmark = pytest.mark.integration

LENGTHS = (1, 15, 40, 150)  # the last in three chunks
NUM_TOKENS = 24  # over the edge of every window
SAMPLING = replace(greedily(NUM_TOKENS), logprobs=3, prompt_logprobs=3)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_log_probabilities_through_two_pools_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    checkpoint = TinyCheckpoint(tmp_path, FAMILIES[name])

    async def check(cluster: LocalCluster, prompt: tuple[int, ...]) -> None:
        done = await cluster.complete(prompt, SAMPLING)
        assert done.token_ids == checkpoint.greedy(prompt, NUM_TOKENS)
        check_all_logprobs(checkpoint, prompt, done, SAMPLING)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            await asyncio.gather(*(check(cluster, checkpoint.prompt(length)) for length in LENGTHS))

    asyncio.run(scenario())
