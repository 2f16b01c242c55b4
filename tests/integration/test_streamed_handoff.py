"""KV leaves while its prompt is still being computed, and nothing of it is read before the commit."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
import torch

from scheduler.batching import BatchLimits
from scheduler.step_plan import StepPlan
from tests.cluster import TinyCheckpoint, greedily, local_cluster
from tests.integration.fake_prefill import GenerateCall
from tests.leaks import until
from workers.model import runner
from workers.step_progress import StepProgress

pytestmark = pytest.mark.integration

CHUNKED = BatchLimits(max_num_seqs=8, max_num_batched_tokens=32)
PROMPT_TOKENS = 100
NUM_TOKENS = 6


def last_chunk(plan: StepPlan) -> bool:
    return any(chunk.sampling is not None and chunk.end == PROMPT_TOKENS for chunk in plan.chunks)


def test_blocks_are_verified_on_the_decode_side_before_the_prompt_is_computed(checkpoint: TinyCheckpoint) -> None:
    """Three of four chunks of the prompt are computed: their six blocks of every layer have arrived."""

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, limits=CHUNKED) as cluster:
            gate = cluster.hold_steps("prefill-0", last_chunk)
            prompt = checkpoint.prompt(PROMPT_TOKENS)
            answer = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            await gate.holding()
            arrived = 96 // checkpoint.spec.block_size * checkpoint.spec.block_bytes
            transfers = cluster.workers["decode-0"].transfers
            await until(lambda: transfers.bytes_under_way == arrived, "the blocks of the computed chunks")
            assert cluster.load("decode-0").generation_tokens == 0
            gate.open()
            assert (await answer).token_ids == checkpoint.greedy(prompt, NUM_TOKENS)
            assert transfers.bytes_under_way == 0

    asyncio.run(scenario())


class LayerGate:
    """Holds a step's thread once its first layer is computed, until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers_done: list[int] = []
        self._opened = threading.Event()
        layer_done = StepProgress.layer_done

        def held(progress: StepProgress, layer: int) -> None:
            layer_done(progress, layer)
            self.layers_done.append(layer)
            self._opened.wait(30)

        monkeypatch.setattr(StepProgress, "layer_done", held)

    def open(self) -> None:
        self._opened.set()


def test_the_first_layer_is_on_the_decode_side_before_the_second_is_computed(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the model of transformers: the native step is one call, which cannot be held between two layers."""
    monkeypatch.setattr(runner, "find_misfit", lambda *_: "the test says so")
    num_tokens = 3 * checkpoint.spec.block_size  # in one step

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            gate = LayerGate(monkeypatch)
            prompt = checkpoint.prompt(num_tokens)
            answer = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            transfers = cluster.workers["decode-0"].transfers
            try:
                await until(lambda: transfers.bytes_under_way > 0, "blocks of the first layer")
                assert gate.layers_done == [0]
                assert transfers.bytes_under_way == 3 * checkpoint.spec.layer_block_bytes
                (ours,), (theirs,) = (cluster.workers[name].manager.leases for name in ("prefill-0", "decode-0"))
                source, target = (cluster.runners[name]._storage.layers for name in ("prefill-0", "decode-0"))
                assert torch.equal(source[0][list(ours.block_ids)], target[0][list(theirs.block_ids)])
                assert target[0][list(theirs.block_ids)].any()
                assert not any(layer[list(ours.block_ids)].any() for layer in source[1:])
            finally:
                gate.open()
            assert (await answer).token_ids == checkpoint.greedy(prompt, NUM_TOKENS)

    asyncio.run(scenario())


def test_a_client_that_leaves_while_kv_streams_leaves_nothing_behind(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, limits=CHUNKED) as cluster:
            gate = cluster.hold_steps("prefill-0", last_chunk)
            prompt = checkpoint.prompt(PROMPT_TOKENS)
            answer = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            await gate.holding()
            await until(lambda: cluster.workers["decode-0"].transfers.bytes_under_way > 0, "the first blocks")
            answer.cancel()
            await until(lambda: cluster.load("decode-0").blocks_leased == 0, "the decode side to give up its lease")
            gate.open()
            await cluster.check_greedy(checkpoint.prompt(40), NUM_TOKENS)

    asyncio.run(scenario())


def test_a_decode_worker_lost_while_kv_streams_ends_the_computing(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=2, limits=CHUNKED) as cluster:
            gate = cluster.hold_steps("prefill-0", last_chunk)
            prompt = checkpoint.prompt(PROMPT_TOKENS)
            call = GenerateCall(
                cluster, "decode-0", "victim", prompt, greedily(1), cluster.workers["prefill-0"].address
            )
            await gate.holding()
            await cluster.kill("decode-0")
            assert (await call.error(within_s=5)).code() is not grpc.StatusCode.OK
            gate.open()
            await until(lambda: not cluster.keeps("victim"), "the prefill worker to give its blocks back")
            await cluster.check_greedy(prompt, NUM_TOKENS)

    asyncio.run(scenario())


def test_a_decode_worker_lost_while_nothing_is_ready_to_be_sent_ends_the_lease_of_its_sender(
    checkpoint: TinyCheckpoint,
) -> None:
    """All that is ready was taken, so no wait for the receiver runs out: the end of the call ends the lease."""

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, limits=CHUNKED) as cluster:
            gate = cluster.hold_steps("prefill-0", last_chunk)
            prompt = checkpoint.prompt(PROMPT_TOKENS)
            address = cluster.workers["prefill-0"].address
            call = GenerateCall(cluster, "decode-0", "victim", prompt, greedily(1), address)
            await gate.holding()
            arrived = 96 // checkpoint.spec.block_size * checkpoint.spec.block_bytes
            transfers = cluster.workers["decode-0"].transfers
            await until(lambda: transfers.bytes_under_way == arrived, "all that is ready to be taken")
            (lease,) = cluster.workers["prefill-0"].manager.leases
            await cluster.kill("decode-0")
            await until(lambda: not lease.is_open, "the lease to end, whose term is 30 s")
            assert not list(cluster.workers["prefill-0"].manager.leases)
            await call.error(within_s=5)
            gate.open()
            await until(lambda: not cluster.keeps("victim"), "the prefill worker to give its blocks back")

    asyncio.run(scenario())


def test_many_prompts_stream_side_by_side(checkpoint: TinyCheckpoint) -> None:
    """Their chunks share steps and the connection."""

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, limits=CHUNKED) as cluster:
            prompts = [checkpoint.prompt(20 + 17 * index, seed=index) for index in range(8)]
            await asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))
            load = cluster.load("decode-0")
            assert load.transfer_bytes == sum(checkpoint.spec.handoff_bytes(len(prompt)) for prompt in prompts)
            assert load.transfer_failures == ()

    asyncio.run(scenario())
