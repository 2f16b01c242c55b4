"""Prompts that begin alike, over real workers: less is computed and less is sent, and every token stays the same."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import grpc
import pytest

from kvcache.errors import TransferFault
from kvcache.transfer.wire import ChunkRange
from scheduler.request import SamplingParams
from tests.cluster import BLOCK_SIZE, LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.integration.fake_prefill import GenerateCall, expect_refusal, fake_prefill
from tests.leaks import until

pytestmark = pytest.mark.integration

NUM_TOKENS = 12
SHARED = 160  # ten blocks
TWO_POOLS = {"prefill": 1, "decode": 1}
COLOCATED = {"colocated": 1}
POOLS = pytest.mark.parametrize("pools", [TWO_POOLS, COLOCATED], ids=["two pools", "colocated"])


def continued(checkpoint: TinyCheckpoint, num_tokens: int, seed: int, shared: int = SHARED) -> tuple[int, ...]:
    """A prompt that begins as all those with as many ``shared`` tokens do."""
    return (*checkpoint.prompt(shared), *checkpoint.prompt(num_tokens, seed=seed))


def whole_blocks(num_tokens: int) -> int:
    """Tokens of a prompt that can be cached: its last one is always computed."""
    return (num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE


def prefill_load(cluster: LocalCluster) -> int:
    return cluster.load("colocated-0" if "colocated-0" in cluster.workers else "prefill-0").prompt_tokens_computed


@POOLS
@pytest.mark.parametrize("num_more", [1, 16, 100])
def test_a_shared_prefix_is_computed_and_sent_once(
    checkpoint: TinyCheckpoint, pools: dict[str, int], num_more: int
) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools) as cluster:
            assert await cluster.check_greedy(continued(checkpoint, 30, seed=1), NUM_TOKENS) == 0
            prompt = continued(checkpoint, num_more, seed=2)
            assert await cluster.check_greedy(prompt, NUM_TOKENS) == SHARED
            assert prefill_load(cluster) == SHARED + 30 + num_more
            if pools is TWO_POOLS:
                spec = checkpoint.spec
                sent = spec.handoff_bytes(SHARED + 30) + spec.handoff_bytes(num_more)
                assert cluster.load("decode-0").transfer_bytes == sent

    asyncio.run(scenario())


@POOLS
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 32, 33, 200])
def test_the_same_prompt_again_gives_the_same_tokens(
    checkpoint: TinyCheckpoint, pools: dict[str, int], num_tokens: int
) -> None:
    prompt = checkpoint.prompt(num_tokens)

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools) as cluster:
            await cluster.check_greedy(prompt, NUM_TOKENS)
            before = cluster.load(next(reversed(cluster.workers))).transfer_bytes
            assert await cluster.check_greedy(prompt, NUM_TOKENS) == whole_blocks(num_tokens)
            if pools is TWO_POOLS:  # the last block goes over the wire, whatever is held
                assert cluster.load("decode-0").transfer_bytes - before == checkpoint.spec.block_bytes

    asyncio.run(scenario())


@POOLS
def test_seeded_sampling_is_the_same_with_a_cached_prefix(checkpoint: TinyCheckpoint, pools: dict[str, int]) -> None:
    sampling = SamplingParams(NUM_TOKENS, temperature=1.0, seed=11)
    prompt = checkpoint.prompt(83)

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools) as cluster:
            for cached in (0, 80):
                completion = await cluster.complete(prompt, sampling)
                assert completion.token_ids == checkpoint.sampled(prompt, sampling)
                assert completion.num_cached_tokens == cached

    asyncio.run(scenario())


def test_a_prefill_worker_that_never_saw_the_prefix_computes_it_and_sends_only_what_is_missing(
    checkpoint: TinyCheckpoint,
) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=2, decode=1) as cluster:
            for seed in (1, 2):  # idle workers take turns
                assert await cluster.check_greedy(continued(checkpoint, 10, seed), NUM_TOKENS) == 0
            assert [cluster.load(f"prefill-{index}").prompt_tokens_computed for index in (0, 1)] == [SHARED + 10] * 2
            spec = checkpoint.spec
            assert cluster.load("decode-0").transfer_bytes == spec.handoff_bytes(SHARED + 10) + spec.handoff_bytes(10)

    asyncio.run(scenario())


def test_cached_blocks_leave_before_anything_is_computed(checkpoint: TinyCheckpoint) -> None:
    """On a prefill worker that has the prefix, for a decode worker that has not."""

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=2) as cluster:
            await cluster.check_greedy(continued(checkpoint, 10, seed=1), NUM_TOKENS)
            gate = cluster.hold_steps("prefill-0", lambda plan: True)
            second = asyncio.create_task(cluster.check_greedy(continued(checkpoint, 10, seed=2), NUM_TOKENS))
            await gate.holding()
            used = [placement.decode.worker_id for placement in cluster.scheduler.placements]
            assert used == ["decode-0", "decode-1"]
            transfers = cluster.workers["decode-1"].transfers
            cached_bytes = SHARED // BLOCK_SIZE * checkpoint.spec.block_bytes
            await until(lambda: transfers.bytes_under_way == cached_bytes, "the cached blocks")
            gate.open()
            assert await second == SHARED

    asyncio.run(scenario())


@POOLS
def test_the_next_turn_of_a_conversation_computes_only_what_is_new(
    checkpoint: TinyCheckpoint, pools: dict[str, int]
) -> None:
    """The decode worker has the answer as well; a prefill worker has only what it computed."""
    prompt = checkpoint.prompt(70)
    answer = checkpoint.greedy(prompt, 40)
    second = (*prompt, *answer, *checkpoint.prompt(20, seed=3))
    held = (70 + 40 - 1) // BLOCK_SIZE

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools) as cluster:
            await cluster.check_greedy(prompt, 40)
            worker_id = next(reversed(cluster.workers))  # that which decodes
            before = cluster.load(worker_id)
            cached = await cluster.check_greedy(second, NUM_TOKENS)
            after = cluster.load(worker_id)
            assert after.prefix_cache_hits - before.prefix_cache_hits == held * BLOCK_SIZE
            if pools is TWO_POOLS:
                assert cached == 64  # the prompt's own
                num_sent = checkpoint.spec.num_blocks_for(len(second)) - held
                assert after.transfer_bytes - before.transfer_bytes == num_sent * checkpoint.spec.block_bytes
            else:
                assert cached == held * BLOCK_SIZE

    asyncio.run(scenario())


@POOLS
def test_many_at_once_with_a_shared_prefix_give_the_reference(
    checkpoint: TinyCheckpoint, pools: dict[str, int]
) -> None:
    prompts = [continued(checkpoint, 1 + 7 * (index // 2), seed=index // 2, shared=48) for index in range(16)]

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools) as cluster:
            await asyncio.gather(*(cluster.check_greedy(prompt, 30) for prompt in prompts))
            assert prefill_load(cluster) < sum(len(prompt) for prompt in prompts)

    asyncio.run(scenario())


@POOLS
def test_different_salts_share_nothing(checkpoint: TinyCheckpoint, pools: dict[str, int]) -> None:
    prompt = checkpoint.prompt(100)

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools) as cluster:
            for salt, cached in ((b"", 0), (b"one", 0), (b"another", 0), (b"one", 96), (b"", 96)):
                assert await cluster.check_greedy(prompt, NUM_TOKENS, salt) == cached
            spec = checkpoint.spec
            expected = 3 * spec.handoff_bytes(100) + 2 * spec.handoff_bytes(4) if pools is TWO_POOLS else 0
            assert cluster.load(next(reversed(cluster.workers))).transfer_bytes == expected

    asyncio.run(scenario())


@POOLS
def test_without_the_prefix_cache_everything_is_computed_and_sent(
    checkpoint: TinyCheckpoint, pools: dict[str, int]
) -> None:
    prompt = checkpoint.prompt(100)

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools, prefix_caching=False) as cluster:
            for _ in range(2):
                assert await cluster.check_greedy(prompt, NUM_TOKENS) == 0
            assert prefill_load(cluster) == 200
            assert all(cluster.load(worker_id).prefix_cache_hits == 0 for worker_id in cluster.workers)

    asyncio.run(scenario())


def test_a_client_that_leaves_while_the_missing_blocks_are_sent_leaves_the_prefix_to_others(
    checkpoint: TinyCheckpoint,
) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, **TWO_POOLS) as cluster:
            await cluster.check_greedy(continued(checkpoint, 10, seed=1), NUM_TOKENS)
            gate = cluster.hold_transfers("decode-0", after_chunks=1)
            victim = asyncio.create_task(cluster.complete(continued(checkpoint, 100, seed=2), greedily(40)))
            await gate.holding()
            (lease,) = cluster.workers["decode-0"].manager.leases
            assert (lease.first_block, len(lease.block_ids)) == (10, 7)
            sharing = asyncio.create_task(cluster.check_greedy(continued(checkpoint, 20, seed=3), NUM_TOKENS))
            await until(lambda: gate.num_held == 2, "the other to share the prefix")
            victim.cancel()
            await asyncio.wait({victim})
            await until(lambda: not lease.is_open, "the lease to end")
            gate.open()
            assert await sharing == SHARED
            assert await cluster.check_greedy(continued(checkpoint, 100, seed=2), NUM_TOKENS) >= SHARED

    asyncio.run(scenario())


def test_a_client_that_leaves_in_the_middle_of_its_prefill_leaves_what_was_computed(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, **TWO_POOLS) as cluster:
            gate = cluster.hold_steps("prefill-0", lambda plan: plan.chunks[0].end > 100)
            prompt = checkpoint.prompt(200)
            victim = asyncio.create_task(cluster.complete(prompt, greedily(40)))
            await gate.holding()  # in the second of four chunks
            victim.cancel()
            await asyncio.wait({victim})
            request_id = cluster.scheduler.placements[0].request_id
            aborted = cluster.workers["prefill-0"].step_loop.batcher._aborted_in_step
            await until(lambda: request_id in aborted, "the prefill worker to hear of it")
            gate.open()
            assert await cluster.check_greedy(prompt, NUM_TOKENS) == 128
            assert cluster.load("decode-0").prefix_cache_hits == 0  # what was not committed is not cached

    asyncio.run(scenario())


def test_a_client_that_leaves_while_it_decodes_leaves_its_answer_to_the_next(checkpoint: TinyCheckpoint) -> None:
    prompt = checkpoint.prompt(30)

    async def scenario() -> None:
        async with local_cluster(checkpoint, **COLOCATED) as cluster:
            num_tokens = 0
            async with aclosing(cluster.engine.generate(prompt, greedily(300))) as stream:
                async for delta in stream:
                    num_tokens += len(delta.token_ids)
                    if num_tokens >= 40:
                        break
            second = (*prompt, *checkpoint.greedy(prompt, 40))
            assert await cluster.check_greedy(second, NUM_TOKENS) >= 64

    asyncio.run(scenario())


@pytest.mark.parametrize("where", [ChunkRange(0, 0, 5), ChunkRange(0, 3, 2), ChunkRange(0, 3, 1)])
def test_a_sender_cannot_write_to_blocks_that_are_held_already(checkpoint: TinyCheckpoint, where: ChunkRange) -> None:
    """Others may read them at this moment."""
    prompt = checkpoint.prompt(70)  # five blocks, of which the first four are held

    async def scenario() -> None:
        async with fake_prefill() as fake, local_cluster(checkpoint, **TWO_POOLS) as cluster:
            await cluster.check_greedy(prompt, NUM_TOKENS)
            call = GenerateCall(cluster, "decode-0", "victim", prompt, greedily(1), fake.address)
            handoff = await fake.handoffs.get()
            assert handoff.request.num_held_tokens == 4 * checkpoint.spec.block_size
            bad = handoff.chunk(0, where, bytes(where.num_blocks * checkpoint.spec.layer_block_bytes))
            await expect_refusal(cluster, [handoff.opening(checkpoint.spec), bad], TransferFault.OUT_OF_BOUNDS)
            handoff.end(grpc.StatusCode.UNAVAILABLE)
            assert (await call.error()).code() is grpc.StatusCode.ABORTED
            assert await cluster.check_greedy(prompt, NUM_TOKENS) == 64

    asyncio.run(scenario())


def test_a_sequence_whose_worker_died_goes_on_with_what_the_other_has_cached(checkpoint: TinyCheckpoint) -> None:
    prompt = continued(checkpoint, 20, seed=1)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=2) as cluster:
            for _ in range(2):
                await cluster.check_greedy(prompt, 1)  # both decode workers have it
            token_ids: list[int] = []
            told: list[int | None] = []
            async with aclosing(cluster.engine.generate(prompt, greedily(40))) as stream:
                async for delta in stream:
                    token_ids += delta.token_ids
                    told.append(delta.num_cached_tokens)
                    if len(token_ids) == 5:
                        await cluster.kill(cluster.scheduler.placements[-1].decode.worker_id)
            assert tuple(token_ids) == checkpoint.greedy(prompt, 40)
            assert told == [176] + [None] * (len(told) - 1)

    asyncio.run(scenario())
