"""A worker by itself: what it refuses at its gRPC edge, and that one sequence's trouble stays its own (F12, F19)."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcache.prefix import MAX_SALT_BYTES
from scheduler.batching import BatchLimits
from scheduler.request import RequestStatus
from scheduler.step_plan import StepPlan
from tests.cluster import MAX_MODEL_LEN, TinyCheckpoint, greedily, local_cluster
from tests.integration.fake_prefill import GenerateCall, fake_prefill
from tests.leaks import until
from workers import worker_pb2 as pb
from workers.messages import PARAM_METADATA_KEY
from workers.model.comparison import compared_tokens
from workers.service import MAX_ID_LENGTH

pytestmark = pytest.mark.integration

VALID: dict[str, object] = {
    "request_id": "a",
    "prompt_token_ids": [1, 2, 3],
    "max_tokens": 5,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
}

# name → (what differs from VALID, the field that the refusal names)
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "token id beyond the vocabulary": ({"prompt_token_ids": [1, 2**31]}, "prompt"),
    "token id just beyond it": ({"prompt_token_ids": "vocab_size"}, "prompt"),
    "empty prompt": ({"prompt_token_ids": []}, "prompt"),
    "prompt as long as the context": ({"prompt_token_ids": [1] * MAX_MODEL_LEN}, "prompt"),
    "prompt far beyond the context": ({"prompt_token_ids": [1] * 100_000}, "prompt"),
    "no token wanted": ({"max_tokens": 0}, "max_tokens"),
    "more tokens than fit": ({"max_tokens": MAX_MODEL_LEN - 2}, "max_tokens"),
    "empty request id": ({"request_id": ""}, "request_id"),
    "huge request id": ({"request_id": "x" * (MAX_ID_LENGTH + 1)}, "request_id"),
    "cache salt too long": ({"cache_salt": bytes(MAX_SALT_BYTES + 1)}, "cache_salt"),
    "temperature not a number": ({"temperature": float("nan")}, "temperature"),
    "temperature infinite": ({"temperature": float("inf")}, "temperature"),
    "temperature negative": ({"temperature": -0.1}, "temperature"),
    "top_p not a number": ({"top_p": float("nan")}, "top_p"),
    "top_p above one": ({"top_p": 1.01}, "top_p"),
    "top_k beyond the vocabulary": ({"top_k": 2**32 - 1}, "top_k"),
    "penalty not a number": ({"frequency_penalty": float("nan")}, "frequency_penalty"),
    "bias beyond the vocabulary": ({"logit_bias": [pb.LogitBias(token_id=2**31, bias=1)]}, "logit_bias"),
    "allowed token beyond the vocabulary": ({"allowed_token_ids": [2**31]}, "allowed_token_ids"),
    "stop token beyond the vocabulary": ({"stop_token_ids": [2**31], "min_tokens": 1}, "stop_token_ids"),
    "too many likeliest": ({"logprobs": 21}, "logprobs"),
    "priority out of bounds": ({"urgency": pb.Urgency(priority=1_000_001)}, "priority"),
    "more output delivered than there is": ({"num_delivered_tokens": 3}, "prompt"),
}


def fields_with(checkpoint: TinyCheckpoint, changes: dict[str, object]) -> dict[str, object]:
    fields = VALID | changes
    if fields["prompt_token_ids"] == "vocab_size":
        fields["prompt_token_ids"] = [checkpoint.vocab_size]
    names = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    sampling = {name: fields.pop(name) for name in names & fields.keys()}
    return fields | {"sampling": pb.SamplingParams(**sampling)}  # type: ignore[arg-type]


async def refusal_of(call: grpc.aio.UnaryStreamCall) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await asyncio.wait_for(call.read(), 5)
    return refusal.value


def param_in(error: grpc.aio.AioRpcError) -> str | bytes | None:
    return dict(error.trailing_metadata() or ()).get(PARAM_METADATA_KEY)


@pytest.mark.parametrize(("changes", "param"), REFUSED.values(), ids=REFUSED.keys())
def test_both_phases_refuse_bad_input_and_live_on(
    checkpoint: TinyCheckpoint, changes: dict[str, object], param: str
) -> None:
    fields = fields_with(checkpoint, changes)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            generate = pb.GenerateRequest(**fields)  # type: ignore[arg-type]
            prefill = pb.PrefillRequest(**fields, transfer_id="t", epoch=1, target_address="nowhere:1")  # type: ignore[arg-type]
            for call in (
                cluster.stub("decode-0").Generate(generate),
                cluster.stub("prefill-0").Prefill(prefill),
            ):
                error = await refusal_of(call)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert param_in(error) == param
            await cluster.check_greedy(checkpoint.prompt(20), 5)

    asyncio.run(scenario())


@pytest.mark.parametrize("transfer_id", ["", "x" * (MAX_ID_LENGTH + 1)], ids=["empty", "huge"])
def test_a_prefill_into_an_impossible_transfer_is_refused(checkpoint: TinyCheckpoint, transfer_id: str) -> None:
    fields = fields_with(checkpoint, {})

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            request = pb.PrefillRequest(**fields, transfer_id=transfer_id, epoch=1)  # type: ignore[arg-type]
            error = await refusal_of(cluster.stub("prefill-0").Prefill(request))
            assert (error.code(), param_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "transfer_id")
            await cluster.check_greedy(checkpoint.prompt(20), 5)

    asyncio.run(scenario())


def test_a_prefill_from_beyond_the_end_of_the_prompt_is_refused(checkpoint: TinyCheckpoint) -> None:
    fields = fields_with(checkpoint, {})

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            handoff = {"transfer_id": "t", "epoch": 1, "target_address": "nowhere:1", "num_held_tokens": 10_000}
            request = pb.PrefillRequest(**fields, **handoff)  # type: ignore[arg-type]
            error = await refusal_of(cluster.stub("prefill-0").Prefill(request))
            assert (error.code(), param_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "num_held_tokens")

    asyncio.run(scenario())


def test_a_prefill_for_nobody_is_refused(checkpoint: TinyCheckpoint) -> None:
    fields = fields_with(checkpoint, {})

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            request = pb.PrefillRequest(**fields, transfer_id="t", epoch=1)  # type: ignore[arg-type]
            error = await refusal_of(cluster.stub("prefill-0").Prefill(request))
            assert (error.code(), param_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "target_address")
            await cluster.check_greedy(checkpoint.prompt(20), 5)

    asyncio.run(scenario())


def test_a_worker_ends_what_was_placed_on_it_in_its_other_role(checkpoint: TinyCheckpoint) -> None:
    """Roles change while requests are on their way."""

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            prompt = checkpoint.prompt(20)
            call = GenerateCall(cluster, "prefill-0", "late", prompt, greedily(5))
            await until(lambda: len(call.token_ids) == 5, "all tokens")
            assert tuple(call.token_ids) == checkpoint.greedy(prompt, 5)

    asyncio.run(scenario())


def test_a_request_id_in_use_is_refused_and_its_owner_goes_on(checkpoint: TinyCheckpoint) -> None:
    prompt = checkpoint.prompt(20)

    async def scenario() -> None:
        async with local_cluster(checkpoint, colocated=1) as cluster:
            owner = GenerateCall(cluster, "colocated-0", "taken", prompt, greedily(100))
            await until(lambda: len(owner.token_ids) > 0, "the owner to decode")
            twin = GenerateCall(cluster, "colocated-0", "taken", prompt, greedily(100))
            error = await twin.error()
            assert (error.code(), param_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "request_id")
            assert await owner.finished() == checkpoint.greedy(prompt, 100)

    asyncio.run(scenario())


def test_a_sequence_that_can_never_fit_the_cache_is_refused(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, colocated=1, num_blocks=4) as cluster:
            error = await GenerateCall(cluster, "colocated-0", "a", checkpoint.prompt(33), greedily(33)).error()
            assert (error.code(), param_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "max_tokens")
            await cluster.check_greedy(checkpoint.prompt(33), 32)  # 64 tokens of KV: it just fits

    asyncio.run(scenario())


SMALL_QUEUE = BatchLimits(max_num_seqs=1, max_num_batched_tokens=64, max_num_waiting=2)


def test_a_full_queue_is_refused_and_the_rest_finish(checkpoint: TinyCheckpoint) -> None:
    prompts = [checkpoint.prompt(20, seed=index) for index in range(3)]

    async def scenario() -> None:
        async with local_cluster(checkpoint, colocated=1, limits=SMALL_QUEUE) as cluster:
            gate = cluster.hold_steps("colocated-0", lambda plan: True)
            accepted = [GenerateCall(cluster, "colocated-0", "0", prompts[0], greedily(10))]
            await gate.holding()
            accepted += [GenerateCall(cluster, "colocated-0", str(i), prompts[i], greedily(10)) for i in (1, 2)]
            await until(lambda: cluster.load("colocated-0").waiting == 2, "the queue to be full")
            error = await GenerateCall(cluster, "colocated-0", "3", prompts[0], greedily(10)).error()
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            gate.open()
            for call, prompt in zip(accepted, prompts, strict=True):
                assert await call.finished() == checkpoint.greedy(prompt, 10)

    asyncio.run(scenario())


def test_a_full_queue_of_the_prefill_worker_reaches_the_client_as_back_pressure(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        limits = BatchLimits(max_num_batched_tokens=64, max_num_waiting=1)
        async with local_cluster(checkpoint, prefill=1, decode=1, limits=limits) as cluster:
            address = cluster.workers["prefill-0"].address
            gate = cluster.hold_steps("prefill-0", lambda plan: True)
            calls = []
            for index in range(3):  # one computes, one waits, one is too many
                prompt = checkpoint.prompt(20, seed=index)
                calls.append(GenerateCall(cluster, "decode-0", str(index), prompt, greedily(10), address))
                if index < 2:
                    await until(lambda: cluster.load("decode-0").waiting == 0, "the decode worker to reserve")
                    await until(lambda n=index: cluster.load("prefill-0").waiting == n, "prefill to queue")  # type: ignore[misc]
                    await gate.holding()
            assert (await calls[2].error()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            gate.open()
            for index, call in enumerate(calls[:2]):
                assert await call.finished() == checkpoint.greedy(checkpoint.prompt(20, seed=index), 10)

    asyncio.run(scenario())


class Poison:
    """Every step that has the poisoned sequence in it fails, from some position on."""

    def __init__(self, request_id: str, position: int) -> None:
        self.batch_sizes: list[int] = []  # of the steps that failed
        self._request_id = request_id
        self._position = position

    def __call__(self, plan: StepPlan) -> None:
        if any(chunk.request_id == self._request_id and chunk.end > self._position for chunk in plan.chunks):
            self.batch_sizes.append(len(plan.chunks))
            raise ValueError("poison")


@pytest.mark.parametrize("at", ["prefill-0", "decode-0"])
def test_a_poison_request_fails_alone(checkpoint: TinyCheckpoint, caplog: pytest.LogCaptureFixture, at: str) -> None:
    caplog.set_level(logging.CRITICAL, logger="workers.step_loop")
    prompts = [checkpoint.prompt(20, seed=index) for index in range(8)]
    position = 0 if at == "prefill-0" else 22  # decoding, the third token of its own

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, limits=BatchLimits()) as cluster:
            gate = cluster.hold_steps(at, lambda plan: True)
            address = cluster.workers["prefill-0"].address

            def call(request_id: str, prompt: tuple[int, ...]) -> GenerateCall:
                return GenerateCall(cluster, "decode-0", request_id, prompt, greedily(60), address)

            calls = [call(f"good-{index}", prompt) for index, prompt in enumerate(prompts[:4])]
            await gate.holding()
            calls += [call(f"late-{index}", prompt) for index, prompt in enumerate(prompts[4:])]
            bad = call("poison", checkpoint.prompt(20))
            batcher = cluster.workers[at].step_loop.batcher
            arriving = ("late-0", "late-1", "late-2", "late-3", "poison")
            await until(lambda: all(map(batcher.find, arriving)), "the poison and its neighbours to arrive")
            poison = Poison("poison", position)
            cluster.runners[at].before_step = poison
            gate.open()
            error = await bad.error()
            assert error.code() is grpc.StatusCode.INTERNAL
            assert "poison" in (error.details() or "")
            for good, prompt in zip(calls, prompts, strict=True):
                assert await good.finished() == checkpoint.greedy(prompt, 60)
            assert poison.batch_sizes[0] > 1  # it stood among others
            assert poison.batch_sizes[1:] == [1]  # and was tried once by itself

    asyncio.run(scenario())


def test_steps_begin_ahead_and_everybody_gets_their_tokens(checkpoint: TinyCheckpoint) -> None:
    """Prompts join, sequences end by length, at a stop token and because their client went away, all meanwhile."""
    prompts = [checkpoint.prompt(10 + index, seed=index) for index in range(6)]
    stop = checkpoint.greedy(prompts[0], 40)[20]

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            address = cluster.workers["prefill-0"].address
            # A step of the tiny model alone has ended before the next one is planned.
            cluster.runners["decode-0"].before_step = lambda _plan: time.sleep(0.003)
            gone = GenerateCall(cluster, "decode-0", "gone", prompts[1], greedily(200), address)
            stopped = GenerateCall(cluster, "decode-0", "stopped", prompts[0], greedily(40, (stop,)), address)
            checks = [asyncio.create_task(cluster.check_greedy(prompt, 60)) for prompt in prompts]
            expected = checkpoint.greedy(prompts[0], 40)
            assert await stopped.finished() == expected[: expected.index(stop) + 1]
            await gone.leave()
            await asyncio.gather(*checks)
            assert cluster.runners["decode-0"].num_steps_ahead > 0
            assert cluster.runners["prefill-0"].num_steps_ahead == 0

    asyncio.run(scenario())


def poison_token(checkpoint: TinyCheckpoint, harmless: set[int]) -> int:
    """Makes the embedding of a token that is not ``harmless`` NaN in the checkpoint's file; returns the token."""
    harmless = harmless.union(compared_tokens(checkpoint.vocab_size))  # with those the model would not be loaded
    token = next(token for token in range(checkpoint.vocab_size) if token not in harmless)
    path = checkpoint.path / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    return token


@pytest.mark.parametrize("at", ["prefill-0", "decode-0"])
def test_logits_that_are_not_finite_fail_their_request_alone_and_name_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    caplog.set_level(logging.CRITICAL, logger="workers.step_loop")
    checkpoint = TinyCheckpoint(tmp_path)
    prompts = [checkpoint.prompt(20, seed=index) for index in range(5)]
    answers = [checkpoint.greedy(prompt, 30) for prompt in prompts]
    poison = poison_token(checkpoint, {token for tokens in prompts + answers for token in tokens})
    sampling = replace(greedily(30), allowed_token_ids=(poison,))  # its first token is the next step's poison
    bad_prompt = prompts[0] if at == "decode-0" else (*prompts[0][:-1], poison)
    batch_sizes: list[int] = []  # of the steps with the poison in them

    def watch(plan: StepPlan) -> None:
        if any(poison in chunk.token_ids for chunk in plan.chunks):
            batch_sizes.append(len(plan.chunks))

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, limits=BatchLimits()) as cluster:
            gate = cluster.hold_steps(at, lambda plan: True)
            address = cluster.workers["prefill-0"].address
            calls = [GenerateCall(cluster, "decode-0", "good-0", prompts[0], greedily(30), address)]
            await gate.holding()
            bad = GenerateCall(cluster, "decode-0", "bad", bad_prompt, sampling, address)
            calls += [
                GenerateCall(cluster, "decode-0", f"good-{index}", prompts[index], greedily(30), address)
                for index in range(1, 5)
            ]
            batcher = cluster.workers[at].step_loop.batcher
            await until(lambda: all(map(batcher.find, ("bad", "good-4"))), "the poison and its neighbours to arrive")
            cluster.runners[at].before_step = watch
            gate.open()
            details = (await bad.error()).details() or ""
            assert f"logits of request bad after position {20 if at == 'decode-0' else 19} are not finite" in details
            assert [await good.finished() for good in calls] == answers
            assert batch_sizes[0] > 1 and batch_sizes[1:] == [1]

    asyncio.run(scenario())


@pytest.mark.parametrize("pools", [{"prefill": 1, "decode": 1}, {"colocated": 1}], ids=["two pools", "colocated"])
def test_out_of_blocks_everybody_finishes_with_the_right_tokens(
    checkpoint: TinyCheckpoint, pools: dict[str, int]
) -> None:
    prompts = [checkpoint.prompt(10 + 3 * index, seed=index) for index in range(10)]
    worker_id = "colocated-0" if "colocated" in pools else "decode-0"

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools, num_blocks=12) as cluster:
            await asyncio.gather(*(cluster.check_greedy(prompt, 60) for prompt in prompts))
            assert cluster.load(worker_id).preemptions > 0

    asyncio.run(scenario())


@pytest.mark.parametrize("pools", [{"prefill": 1, "decode": 1}, {"colocated": 1}], ids=["two pools", "colocated"])
def test_out_of_blocks_with_a_shared_prefix_everybody_finishes_with_the_right_tokens(
    checkpoint: TinyCheckpoint, pools: dict[str, int]
) -> None:
    shared = checkpoint.prompt(40)
    prompts = [(*shared, *checkpoint.prompt(1 + index, seed=index)) for index in range(10)]
    worker_id = "colocated-0" if "colocated" in pools else "decode-0"

    async def scenario() -> None:
        async with local_cluster(checkpoint, **pools, num_blocks=12) as cluster:
            await asyncio.gather(*(cluster.check_greedy(prompt, 60) for prompt in prompts))
            load = cluster.load(worker_id)
            assert (load.preemptions > 0, load.prefix_cache_hits > 0) == (True, True)

    asyncio.run(scenario())


def test_handoffs_that_hold_all_blocks_do_not_stop_a_running_sequence_for_ever(checkpoint: TinyCheckpoint) -> None:
    """A sequence that cannot grow waits for blocks in handoffs; when those fail, it goes on."""
    prompt = checkpoint.prompt(15)

    async def scenario() -> None:
        async with fake_prefill() as fake, local_cluster(checkpoint, colocated=1, num_blocks=8) as cluster:
            gate = cluster.hold_steps("colocated-0", lambda plan: plan.chunks[0].end > 15)
            running = GenerateCall(cluster, "colocated-0", "running", prompt, greedily(40))
            await gate.holding()  # it has two blocks, of which it needs a third later
            waiting = GenerateCall(cluster, "colocated-0", "handoff", checkpoint.prompt(80), greedily(1), fake.address)
            batcher = cluster.workers["colocated-0"].step_loop.batcher
            await until(lambda: batcher.find("handoff") is not None, "the other to arrive")
            gate.open()
            handoff = await fake.handoffs.get()
            request = batcher.find("handoff")
            assert request is not None and request.status is RequestStatus.WAITING_FOR_KV
            await until(lambda: cluster.load("colocated-0").blocks_free == 0, "all blocks to be taken")
            await until(lambda: len(running.token_ids) == 18 + 16, "the running one to stand still")
            handoff.end(grpc.StatusCode.UNAVAILABLE)
            assert (await waiting.error()).code() is grpc.StatusCode.ABORTED
            assert await running.finished() == checkpoint.greedy(prompt, 40)

    asyncio.run(scenario())
