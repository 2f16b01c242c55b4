"""Prefill here, decode there: the tokens are those of one model that does both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import pytest

from scheduler.request import FinishReason, SamplingParams
from scheduler.step_plan import StepPlan
from tests.cluster import LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.leaks import until
from workers.stages import Stage

pytestmark = pytest.mark.integration

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 200)  # around the edges of blocks of 16, and in several chunks
NUM_TOKENS = 12


async def check_all_greedy(cluster: LocalCluster, prompts: Sequence[tuple[int, ...]]) -> None:
    await asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))


def many_prompts(checkpoint: TinyCheckpoint, count: int) -> list[tuple[int, ...]]:
    return [checkpoint.prompt(LENGTHS[i % len(LENGTHS)], seed=i) for i in range(count)]


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_a_prompt_alone_through_two_pools_gives_the_reference(checkpoint: TinyCheckpoint, num_tokens: int) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            await cluster.check_greedy(checkpoint.prompt(num_tokens), NUM_TOKENS)

    asyncio.run(scenario())


def test_sixteen_at_once_through_two_pools_give_the_reference(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            await check_all_greedy(cluster, many_prompts(checkpoint, 16))

    asyncio.run(scenario())


def test_each_pool_does_its_own_phase_only(checkpoint: TinyCheckpoint) -> None:
    prompts = many_prompts(checkpoint, 16)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            await check_all_greedy(cluster, prompts)
            prefill, decode = (cluster.load(name) for name in ("prefill-0", "decode-0"))
            assert prefill.prompt_tokens_computed == sum(len(prompt) for prompt in prompts)
            assert prefill.generation_tokens == 0  # the first of each is counted where it goes on to the client
            assert decode.prompt_tokens_computed == 0
            assert decode.generation_tokens == len(prompts) * NUM_TOKENS

    asyncio.run(scenario())


def test_exactly_the_kv_of_the_prompts_moves(checkpoint: TinyCheckpoint) -> None:
    prompts = many_prompts(checkpoint, 8)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            await check_all_greedy(cluster, prompts)
            load = cluster.load("decode-0")
            assert load.transfers == len(prompts)
            assert load.transfer_bytes == sum(checkpoint.spec.handoff_bytes(len(prompt)) for prompt in prompts)
            assert load.transfer_failures == ()

    asyncio.run(scenario())


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_rounded_cache_moves_with_its_scales(checkpoint: TinyCheckpoint, dtype: str) -> None:
    """Two pools give what one worker gives with the same KV."""
    rounded = copy(checkpoint)
    rounded.spec = replace(checkpoint.spec, dtype=dtype)
    prompts = many_prompts(checkpoint, 8)

    async def answers(**pools: int) -> list[tuple[int, ...]]:
        async with local_cluster(rounded, **pools) as cluster:
            completions = await asyncio.gather(*(cluster.complete(prompt, greedily(NUM_TOKENS)) for prompt in prompts))
            if "decode" in pools:
                moved = sum(rounded.spec.handoff_bytes(len(prompt)) for prompt in prompts)
                assert cluster.load("decode-0").transfer_bytes == moved
            return [completion.token_ids for completion in completions]

    assert asyncio.run(answers(prefill=1, decode=1)) == asyncio.run(answers(colocated=1))


def test_thirty_two_at_once_over_four_workers_give_the_reference(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=2, decode=2) as cluster:
            await check_all_greedy(cluster, many_prompts(checkpoint, 32))
            loads = [worker.load() for worker in cluster.workers.values()]
            assert all(load.generation_tokens > 0 or load.prompt_tokens_computed > 0 for load in loads)

    asyncio.run(scenario())


def test_a_colocated_worker_gives_the_reference(checkpoint: TinyCheckpoint) -> None:
    prompts = many_prompts(checkpoint, 16)

    async def scenario() -> None:
        async with local_cluster(checkpoint, colocated=1) as cluster:
            await check_all_greedy(cluster, prompts)
            load = cluster.load("colocated-0")
            assert load.prompt_tokens_computed == sum(len(prompt) for prompt in prompts)
            assert load.transfers == 0

    asyncio.run(scenario())


SAMPLINGS = (
    SamplingParams(NUM_TOKENS, temperature=1.0, seed=11),
    SamplingParams(NUM_TOKENS, temperature=0.7, top_p=0.9, seed=-5),
    SamplingParams(NUM_TOKENS, temperature=1.5, top_k=40, seed=2**63 - 1),
)


@pytest.mark.parametrize("pools", [{"prefill": 1, "decode": 1}, {"colocated": 1}], ids=["two pools", "colocated"])
@pytest.mark.parametrize("num_others", [0, 10], ids=["alone", "in a batch"])
def test_seeded_sampling_does_not_depend_on_where_or_with_whom(
    checkpoint: TinyCheckpoint, pools: dict[str, int], num_others: int
) -> None:
    prompt = checkpoint.prompt(33)

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools) as cluster:
            others = [cluster.check_greedy(other, 30) for other in many_prompts(checkpoint, num_others)]
            running = asyncio.gather(*others)
            for sampling in SAMPLINGS:
                completion = await cluster.complete(prompt, sampling)
                assert completion.token_ids == checkpoint.sampled(prompt, sampling)
            await running

    asyncio.run(scenario())


def test_one_token_needs_no_decode_step(checkpoint: TinyCheckpoint) -> None:
    prompt = checkpoint.prompt(20)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            steps: list[StepPlan] = []
            cluster.runners["decode-0"].before_step = steps.append
            await cluster.check_greedy(prompt, 1)
            assert steps == []

    asyncio.run(scenario())


@pytest.mark.parametrize("position", [0, 4])
def test_a_stop_token_ends_the_sequence(checkpoint: TinyCheckpoint, position: int) -> None:
    prompt = checkpoint.prompt(20)
    answer = checkpoint.greedy(prompt, NUM_TOKENS)
    stop_token = answer[position]
    expected = answer[: answer.index(stop_token) + 1]

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            completion = await cluster.complete(prompt, greedily(NUM_TOKENS, (stop_token,)))
            assert completion.token_ids == expected
            assert completion.text == checkpoint.tokenizer.decode(expected[:-1])
            assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, stop_token)

    asyncio.run(scenario())


def test_a_stop_string_cuts_the_text_and_ends_the_sequence_on_the_workers(checkpoint: TinyCheckpoint) -> None:
    prompt = checkpoint.prompt(20)
    long = 400
    text = checkpoint.tokenizer.decode(checkpoint.greedy(prompt, 40))
    stop = text[10:14]

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            completion = await cluster.complete(prompt, greedily(long), [stop])
            assert completion.text == text[: text.index(stop)]
            assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, stop)
            request_id = cluster.scheduler.placements[0].request_id
            await until(lambda: not cluster.keeps(request_id), "the workers to give the sequence up", 1.0)
            assert cluster.load("decode-0").generation_tokens < long

    asyncio.run(scenario())


@pytest.mark.parametrize("pools", [{"prefill": 1, "decode": 1}, {"colocated": 1}])
def test_the_stages_of_a_sequence_are_told_at_its_end(checkpoint: TinyCheckpoint, pools: dict[str, int]) -> None:
    told: list[dict[Stage, float]] = []

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools) as cluster:
            cluster.engine._on_stages = told.append
            began_s = time.perf_counter()
            await cluster.check_greedy(checkpoint.prompt(200), NUM_TOKENS)
            assert sum(told[0].values()) <= time.perf_counter() - began_s

    asyncio.run(scenario())
    (stages,) = told
    in_place = {Stage.QUEUE_PREFILL, Stage.PREFILL, Stage.FIRST_DECODE, Stage.DECODE}
    assert set(stages) == (in_place if "colocated" in pools else set(Stage))
    assert all(seconds > 0 for stage, seconds in stages.items() if stage is not Stage.TRANSFER)
