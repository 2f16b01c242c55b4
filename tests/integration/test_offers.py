"""Blocks that go back after a turn: the next turn finds them where prompts are computed, and nothing leaks."""

from __future__ import annotations

import asyncio

import pytest

from scheduler.types import WorkerRole
from tests.cluster import BLOCK_SIZE, LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.integration.test_unlike_pools import specs_of
from tests.leaks import check_no_leaks, until

pytestmark = pytest.mark.integration

PROMPT_TOKENS = 40
NUM_TOKENS = 40
KNOWN = PROMPT_TOKENS + NUM_TOKENS - 1  # the KV of the last token is never computed
RATE = 1 << 30


async def first_turn(cluster: LocalCluster) -> tuple[int, ...]:
    """A turn, and the next one's prompt."""
    prompt = cluster.checkpoint.prompt(PROMPT_TOKENS)
    answer = await cluster.complete(prompt, greedily(NUM_TOKENS))
    return (*prompt, *answer.token_ids, *cluster.checkpoint.prompt(10, seed=5))


@pytest.mark.parametrize(("prefill_block", "decode_block"), [(16, 16), (8, 32), (32, 8)])
def test_the_next_turn_finds_its_whole_history_where_it_is_prefilled(
    checkpoint: TinyCheckpoint, prefill_block: int, decode_block: int
) -> None:
    specs = specs_of(checkpoint, {"block_size": prefill_block}, {"block_size": decode_block})

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, kv_offer_rate=RATE, specs=specs) as cluster:
            prompt = await first_turn(cluster)
            history = KNOWN // decode_block * decode_block // prefill_block * prefill_block
            manager = cluster.workers["prefill-0"].manager
            await until(lambda: len(manager.pool.prefixes) == history // prefill_block, "the history on the other side")
            await until(lambda: cluster.load("decode-0").offered_bytes > 0, "the offer's receipt")
            load = cluster.load("decode-0")
            assert load.offered_bytes < specs[WorkerRole.DECODE].handoff_bytes(history)  # not what was there
            assert load.offers_dropped == 0
            assert await cluster.check_greedy(prompt, 5) == history

    asyncio.run(scenario())


def test_without_a_budget_nothing_goes_back(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            prompt = await first_turn(cluster)
            assert await cluster.check_greedy(prompt, 5) == PROMPT_TOKENS // BLOCK_SIZE * BLOCK_SIZE
            load = cluster.load("decode-0")
            assert (load.offered_bytes, load.offers_dropped) == (0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("rate", "num_blocks"),
    [(1, 256), (RATE, 8)],
    ids=["no budget", "no room"],
)
def test_an_offer_that_is_in_the_way_is_dropped(checkpoint: TinyCheckpoint, rate: int, num_blocks: int) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, kv_offer_rate=rate, num_blocks=num_blocks) as cluster:
            prompt = await first_turn(cluster)
            assert await cluster.check_greedy(prompt, 5) == PROMPT_TOKENS // BLOCK_SIZE * BLOCK_SIZE
            assert cluster.load("decode-0").offered_bytes == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("killed", ["prefill-0", "decode-0"])
def test_neither_side_leaks_when_the_other_dies_in_the_middle(checkpoint: TinyCheckpoint, killed: str) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, kv_offer_rate=RATE) as cluster:
            gate = cluster.hold_transfers("prefill-0", after_chunks=1)
            await first_turn(cluster)
            await gate.holding()
            workers = dict(cluster.workers)
            assert all(worker.load().blocks_leased > 0 for worker in workers.values())
            await cluster.kill(killed)
            (survivor,) = cluster.workers.values()
            # Only then: the rest of the offer has come already, and an open gate might let it be committed, whole.
            await until(lambda: survivor.load().blocks_leased == 0, "the survivor to notice")
            gate.open()
            await check_no_leaks([survivor])
            if killed == "prefill-0":
                assert survivor.load().offers_dropped == 1
            else:
                assert len(survivor.manager.pool.prefixes) == PROMPT_TOKENS // BLOCK_SIZE  # no half of anything

    asyncio.run(scenario())


def test_an_offer_that_falls_silent_loses_its_lease(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, kv_offer_rate=RATE, lease_ttl_s=0.4) as cluster:
            gate = cluster.hold_transfers("prefill-0", after_chunks=1)
            await first_turn(cluster)
            await gate.holding()
            await until(lambda: cluster.load("prefill-0").blocks_leased == 0, "the lease to run out")
            gate.open()
            await check_no_leaks(cluster.workers.values())
            assert cluster.load("decode-0").offers_dropped == 1

    asyncio.run(scenario())
