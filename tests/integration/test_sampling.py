"""Parameters of sampling and log-probabilities, through real workers: what a model that does it all at once gives."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

import httpx
import pytest
import torch

from engine.api.app import create_app
from engine.metrics import Metrics
from kvcache.errors import RequestError
from scheduler.batching import BatchLimits
from scheduler.request import SamplingParams, TokenLogprobs
from tests.cluster import TinyCheckpoint, greedily, local_cluster
from tests.fakes import MODEL_NAME
from tests.logprobs import TOLERANCE, check_all_logprobs, check_logprobs
from tests.unit.workers.reference_sampling import processed

pytestmark = pytest.mark.integration

NUM_TOKENS = 24
POOLS = {"two pools": {"prefill": 1, "decode": 1}, "colocated": {"colocated": 1}}
PENALIZED = SamplingParams(
    NUM_TOKENS, temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.3
)


def expected_tokens(checkpoint: TinyCheckpoint, prompt: Sequence[int], sampling: SamplingParams) -> tuple[int, ...]:
    """Greedy, from the whole sequence for every token, with the plain processors."""
    output: list[int] = []
    while len(output) < sampling.max_tokens:
        row = checkpoint.logits([*prompt, *output])[-1].tolist()
        row = processed(row, sampling, prompt, output)
        output.append(row.index(max(row)))
    return tuple(output)


@pytest.mark.parametrize("pools", POOLS.values(), ids=POOLS.keys())
def test_log_probabilities_are_the_model_s_own(checkpoint: TinyCheckpoint, pools: dict[str, int]) -> None:
    """Of prompts in one chunk and in several, of one token and of many; whatever the penalties do."""
    prompts = [checkpoint.prompt(length, seed=length) for length in (1, 2, 17, 200)]
    sampling = replace(PENALIZED, logprobs=3, prompt_logprobs=2)

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools) as cluster:
            done = await asyncio.gather(*(cluster.complete(prompt, sampling) for prompt in prompts))
            for prompt, each in zip(prompts, done, strict=True):
                check_all_logprobs(checkpoint, prompt, each, sampling)

    asyncio.run(scenario())


@pytest.mark.parametrize("only", [{"logprobs": 0}, {"prompt_logprobs": 0}], ids=["output", "prompt"])
def test_each_kind_comes_without_the_other(checkpoint: TinyCheckpoint, only: dict[str, int]) -> None:
    prompt = checkpoint.prompt(40)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            done = await cluster.complete(prompt, replace(greedily(5), **only))  # type: ignore[arg-type]
            assert len(done.logprobs) == (5 if "logprobs" in only else 0)
            assert len(done.prompt_logprobs) == (39 if "prompt_logprobs" in only else 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("pools", POOLS.values(), ids=POOLS.keys())
def test_penalties_count_the_output_on_whichever_worker_it_was_made(
    checkpoint: TinyCheckpoint, pools: dict[str, int]
) -> None:
    prompts = [checkpoint.prompt(30, seed=index) for index in range(4)]
    expected = [expected_tokens(checkpoint, prompt, PENALIZED) for prompt in prompts]
    assert all(tokens != checkpoint.greedy(prompts[i], NUM_TOKENS) for i, tokens in enumerate(expected))

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools) as cluster:
            done = await asyncio.gather(*(cluster.complete(prompt, PENALIZED) for prompt in prompts))
            assert [each.token_ids for each in done] == expected

    asyncio.run(scenario())


def with_every_memory(checkpoint: TinyCheckpoint, prompt: tuple[int, ...], ends_after: int) -> SamplingParams:
    """Parameters each of which goes wrong when output is taken for prompt: a penalty, a word, a least length."""
    plain = expected_tokens(checkpoint, prompt, PENALIZED)
    return replace(
        PENALIZED,
        bad_words=(plain[3:5], plain[ends_after - 1 : ends_after + 1]),
        stop_token_ids=(plain[ends_after + 1], plain[-1]),
        min_tokens=NUM_TOKENS,
        logprobs=1,
        prompt_logprobs=1,
    )


@pytest.mark.parametrize("dies_after", [1, 8])
def test_a_killed_decode_worker_changes_no_token_of_a_request_with_a_memory(
    checkpoint: TinyCheckpoint, dies_after: int
) -> None:
    prompt = checkpoint.prompt(33)
    sampling = with_every_memory(checkpoint, prompt, dies_after)
    expected = expected_tokens(checkpoint, prompt, sampling)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=2) as cluster:
            gate = cluster.hold_steps("decode-0", lambda plan: plan.chunks[0].end >= len(prompt) + dies_after)
            token_ids: list[int] = []
            logprobs: list[TokenLogprobs] = []
            of_prompt: list[TokenLogprobs] = []
            async with aclosing(cluster.engine.generate(prompt, sampling)) as stream:
                async for delta in stream:
                    token_ids += delta.token_ids
                    logprobs += (each.logprobs for each in delta.logprobs)
                    of_prompt += delta.prompt_logprobs
                    if len(token_ids) == dies_after:
                        await gate.holding()
                        await cluster.kill("decode-0")
            assert tuple(token_ids) == expected
            rows = checkpoint.logits([*prompt, *expected])
            check_logprobs(rows[len(prompt) - 1 : -1], expected, logprobs, 1)
            check_logprobs(rows[: len(prompt) - 1], prompt[1:], of_prompt, 1)  # once, though placed twice

    asyncio.run(scenario())


def test_preemptions_repeat_and_lose_no_log_probability(checkpoint: TinyCheckpoint) -> None:
    prompts = [checkpoint.prompt(40, seed=index) for index in range(4)]
    sampling = replace(PENALIZED, max_tokens=40, logprobs=1, prompt_logprobs=1)
    expected = [expected_tokens(checkpoint, prompt, sampling) for prompt in prompts]

    async def scenario() -> None:
        limits = BatchLimits(max_num_seqs=8, max_num_batched_tokens=32)
        async with local_cluster(checkpoint, colocated=1, num_blocks=13, limits=limits) as cluster:
            done = await asyncio.gather(*(cluster.complete(prompt, sampling) for prompt in prompts))
            assert cluster.load("colocated-0").preemptions > 0
            for prompt, tokens, each in zip(prompts, expected, done, strict=True):
                assert each.token_ids == tokens
                check_all_logprobs(checkpoint, prompt, each, sampling)

    asyncio.run(scenario())


def test_a_request_that_forbids_every_token_fails_alone(checkpoint: TinyCheckpoint) -> None:
    """Allowed are two tokens, and no third one may follow the first two of them."""
    prompt = checkpoint.prompt(20)
    allowed = (5, 6)
    words = tuple((first, second) for first in allowed for second in allowed)
    sampling = replace(greedily(8), allowed_token_ids=allowed, bad_words=words)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            other = asyncio.create_task(cluster.check_greedy(checkpoint.prompt(21), 30))
            with pytest.raises(RequestError, match="forbid every token"):
                await cluster.complete(prompt, sampling)
            await other

    asyncio.run(scenario())


def test_a_prompt_is_scored_over_http_as_evaluations_do(checkpoint: TinyCheckpoint) -> None:
    """``echo`` without new tokens: the sum of log-probabilities, and whether each token was the likeliest."""
    prompt = checkpoint.prompt(30)
    best = checkpoint.greedy(prompt, 4)
    text = [*prompt, *best]
    body = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            app = create_app(cluster.engine, metrics=Metrics(MODEL_NAME, lambda: cluster.engine.cluster))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                reply = (await client.post("/v1/completions", json=body)).json()
        assert reply["usage"]["completion_tokens"] == 0
        logprobs = reply["choices"][0]["logprobs"]
        expected = torch.log_softmax(checkpoint.logits(text).double(), dim=-1)
        wanted = [float(row[token_id]) for row, token_id in zip(expected, text[1:], strict=False)]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx(wanted, abs=TOLERANCE)
        likeliest = [max(top.values()) for top in logprobs["top_logprobs"][-4:]]
        assert likeliest == logprobs["token_logprobs"][-4:]  # the same floats, not only near ones

    asyncio.run(scenario())
