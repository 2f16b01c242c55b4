"""Workers that die in the middle of a request (F1, F2, F3): it goes on elsewhere, with the same tokens."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from kvcache.errors import UnavailableError
from scheduler.request import SamplingParams
from scheduler.step_plan import StepPlan
from tests.cluster import LocalCluster, StepGate, TinyCheckpoint, TransferGate, greedily, local_cluster
from tests.leaks import until

pytestmark = pytest.mark.integration

NUM_TOKENS = 20
PROMPT_TOKENS = 70  # in two chunks, and five blocks
LONG_PROMPT_TOKENS = 300  # what is left of it, when a worker dies in its first chunk, is not computed in place
TOLD_WITHIN_S = 8  # far above what it takes, far below the lease: it is not what ends the wait


def any_step(_plan: StepPlan) -> bool:
    return True


def hold_prefill_0(cluster: LocalCluster, while_it: str) -> StepGate | TransferGate:
    """Stops time while ``prefill-0`` computes, or while a decode worker has two chunks of a handoff."""
    if while_it == "computes":
        return cluster.hold_steps("prefill-0", any_step)
    return cluster.hold_transfers("decode-0", after_chunks=2)


@pytest.mark.parametrize("while_it", ["computes", "sends"])
def test_a_killed_prefill_worker_costs_its_requests_a_retry_and_no_token(
    checkpoint: TinyCheckpoint, while_it: str
) -> None:
    num_tokens = LONG_PROMPT_TOKENS if while_it == "sends" else PROMPT_TOKENS
    prompts = [checkpoint.prompt(num_tokens, seed=index) for index in range(4)]

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=2, decode=1) as cluster:
            gate = hold_prefill_0(cluster, while_it)
            requests = asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))
            await gate.holding()
            placements = cluster.scheduler.placements
            assert len(placements) == len(prompts)
            await cluster.kill("prefill-0")
            gate.open()
            await requests
            prefills = [placed.prefill.worker_id for placed in placements if placed.prefill]
            assert prefills[len(prompts) :] == ["prefill-1"] * prefills.count("prefill-0")
            assert "prefill-0" in prefills

    asyncio.run(scenario())


@pytest.mark.parametrize("while_it", ["computes", "sends"])
def test_with_no_other_prefill_worker_the_client_is_told_at_once(checkpoint: TinyCheckpoint, while_it: str) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            gate = hold_prefill_0(cluster, while_it)
            prompt = checkpoint.prompt(LONG_PROMPT_TOKENS)
            request = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            await gate.holding()
            await cluster.kill("prefill-0")
            with pytest.raises(UnavailableError):
                await asyncio.wait_for(request, TOLD_WITHIN_S)

    asyncio.run(scenario())


def test_a_retry_goes_to_another_worker_although_the_dead_one_has_less_to_do(checkpoint: TinyCheckpoint) -> None:
    """The scheduler has not noticed: an idle dead worker is the best by load, and only its failure speaks against."""

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=2, decode=1) as cluster:
            gate = cluster.hold_steps("prefill-1", any_step)
            await cluster.check_greedy(checkpoint.prompt(10), 1)  # prefill-0
            large = asyncio.create_task(cluster.check_greedy(checkpoint.prompt(300), NUM_TOKENS))  # prefill-1
            await gate.holding()
            await cluster.kill("prefill-0")
            retried = asyncio.create_task(cluster.check_greedy(checkpoint.prompt(20), NUM_TOKENS))
            await until(lambda: len(cluster.scheduler.placements) == 4, "the retry to be placed")
            assert [placed.prefill.worker_id for placed in cluster.scheduler.placements if placed.prefill] == [
                "prefill-0",
                "prefill-1",
                "prefill-0",
                "prefill-1",
            ]
            gate.open()
            await asyncio.gather(large, retried)

    asyncio.run(scenario())


async def stream_with_a_death(
    cluster: LocalCluster, prompt: tuple[int, ...], sampling: SamplingParams, dies_after: int
) -> tuple[int, ...]:
    """The tokens of a stream whose worker, ``decode-0``, is killed before it can compute one more."""
    gate = cluster.hold_steps("decode-0", lambda plan: plan.chunks[0].end >= len(prompt) + dies_after)
    token_ids: list[int] = []
    async with aclosing(cluster.engine.generate(prompt, sampling)) as stream:
        async for delta in stream:
            token_ids += delta.token_ids
            if len(token_ids) == dies_after:
                await gate.holding()
                await cluster.kill("decode-0")
    return tuple(token_ids)


@pytest.mark.parametrize("dies_after", [1, 7, 39])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "seeded"])
def test_a_killed_decode_worker_changes_no_token(
    checkpoint: TinyCheckpoint, temperature: float, dies_after: int
) -> None:
    prompt = checkpoint.prompt(33)
    sampling = SamplingParams(40, temperature=temperature, seed=42)
    reference = checkpoint.sampled(prompt, sampling) if temperature else checkpoint.greedy(prompt, 40)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=2) as cluster:
            assert await stream_with_a_death(cluster, prompt, sampling, dies_after) == reference
            placed = [placement.decode.worker_id for placement in cluster.scheduler.placements]
            assert placed == ["decode-0", "decode-1"]

    asyncio.run(scenario())


def test_a_killed_decode_worker_with_many_streams_changes_no_token(checkpoint: TinyCheckpoint) -> None:
    prompts = [checkpoint.prompt(5 + 9 * index, seed=index) for index in range(10)]

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=2) as cluster:
            streams = [asyncio.create_task(cluster.check_greedy(prompt, 60)) for prompt in prompts]
            await until(lambda: cluster.load("decode-0").generation_tokens > 40, "decode-0 to be at work")
            await cluster.kill("decode-0")
            await asyncio.gather(*streams)
            assert len(cluster.scheduler.placements) > len(prompts)

    asyncio.run(scenario())


def test_with_no_other_decode_worker_the_client_is_told_at_once(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            with pytest.raises(UnavailableError):
                await asyncio.wait_for(
                    stream_with_a_death(cluster, checkpoint.prompt(33), greedily(60), dies_after=5), 2
                )

    asyncio.run(scenario())
