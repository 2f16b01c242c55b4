"""Placements that only real workers can prove: in place on a decode worker, and where a prefix is cached."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from scheduler.placement import PlacementOptions
from tests.cluster import LocalCluster, TinyCheckpoint, local_cluster

pytestmark = pytest.mark.integration


async def publish(cluster: LocalCluster) -> None:
    """A heartbeat of every worker, without what its steps took: that says how busy the machine is."""
    await cluster.scheduler.handle([replace(worker.report(1), steps=()) for worker in cluster.workers.values()])


def test_by_cost_a_short_prompt_is_computed_on_the_decode_worker_without_a_handoff(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, placement=PlacementOptions("cost")) as cluster:
            await cluster.check_greedy(checkpoint.prompt(40), 10)
            (placement,) = cluster.scheduler.placements
            assert (placement.prefill, placement.decode.worker_id) == (None, "decode-0")
            assert cluster.load("decode-0").transfers == 0
            assert cluster.load("decode-0").prompt_tokens_computed == 40

    asyncio.run(scenario())


@pytest.mark.parametrize("policy", ["cache_aware", "cost"])
def test_a_prompt_comes_where_its_beginning_is_cached(checkpoint: TinyCheckpoint, policy: str) -> None:
    """Without what workers publish it would be the other worker's turn."""
    prompt = checkpoint.prompt(100)

    async def scenario() -> None:
        async with local_cluster(checkpoint, colocated=2, placement=PlacementOptions(policy)) as cluster:
            assert await cluster.check_greedy(prompt, 2) == 0
            await publish(cluster)
            assert await cluster.check_greedy((*prompt, 7, 8, 9), 2) == 96
            first, second = cluster.scheduler.placements
            assert first.decode == second.decode
            await publish(cluster)  # a delta to what was published
            other = checkpoint.prompt(50, seed=1)
            await cluster.check_greedy(other, 2)
            await publish(cluster)
            assert await cluster.check_greedy(other, 2) == 48

    asyncio.run(scenario())
