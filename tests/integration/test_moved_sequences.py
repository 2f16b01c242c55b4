"""A worker that drains under a limit: what runs on it goes on elsewhere, with the same tokens."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import grpc
import pytest

from kvcache.errors import MovedError
from scheduler.events import DrainWorker
from scheduler.request import SamplingParams
from tests.cluster import LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.leaks import until
from workers import worker_pb2 as pb
from workers.messages import error_from_rpc, sampling_to_wire

pytestmark = pytest.mark.integration


async def move_away(cluster: LocalCluster, worker_id: str) -> None:
    """As a worker does that is told to drain, and whose time is over."""
    await cluster.scheduler.handle([DrainWorker(worker_id)])
    cluster.workers[worker_id].move_away(moves=True)


def decoded_on(cluster: LocalCluster) -> list[str]:
    return [placement.decode.worker_id for placement in cluster.scheduler.placements]


@pytest.mark.parametrize("after", [1, 7, 39])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "seeded"])
def test_a_stream_goes_on_elsewhere_with_the_next_token(
    checkpoint: TinyCheckpoint, temperature: float, after: int
) -> None:
    prompt = checkpoint.prompt(33)
    sampling = SamplingParams(40, temperature=temperature, seed=42)
    reference = checkpoint.sampled(prompt, sampling) if temperature else checkpoint.greedy(prompt, 40)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=2) as cluster:
            gate = cluster.hold_steps("decode-0", lambda plan: plan.chunks[0].end >= len(prompt) + after)
            token_ids: list[int] = []
            async with aclosing(cluster.engine.generate(prompt, sampling)) as stream:
                async for delta in stream:
                    token_ids += delta.token_ids
                    if len(token_ids) == after:
                        await gate.holding()
                        await move_away(cluster, "decode-0")
                        gate.open()
            assert tuple(token_ids) == reference
            assert decoded_on(cluster) == ["decode-0", "decode-1"]

    asyncio.run(scenario())


def test_nothing_is_left_of_many_streams_and_handoffs_and_no_token_is_lost(checkpoint: TinyCheckpoint) -> None:
    """Some decode, the KV of others is on its way."""
    prompts = [checkpoint.prompt(5 + 9 * index, seed=index) for index in range(10)]

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=2) as cluster:
            early = [asyncio.create_task(cluster.check_greedy(prompt, 60)) for prompt in prompts[:5]]
            await until(lambda: cluster.load("decode-0").generation_tokens > 20, "decode-0 to be at work")
            gate = cluster.hold_transfers("decode-0", after_chunks=1)
            late = [asyncio.create_task(cluster.check_greedy(prompt, 60)) for prompt in prompts[5:]]
            await gate.holding()
            await move_away(cluster, "decode-0")
            gate.open()
            await until(lambda: cluster.load("decode-0").running == 0, "decode-0 to be empty")
            await asyncio.gather(*early, *late)
            assert "decode-0" not in decoded_on(cluster)[len(prompts) :]

    asyncio.run(scenario())


def test_being_moved_is_no_failure_however_often_it_happens(checkpoint: TinyCheckpoint) -> None:
    """More often than a sequence may fail, and at the end it is back where it was."""
    prompt = checkpoint.prompt(20)

    async def scenario() -> None:
        async with local_cluster(checkpoint, colocated=5) as cluster:
            asking = asyncio.create_task(cluster.check_greedy(prompt, 300))
            for index in range(4):
                worker_id = f"colocated-{index}"
                await until(lambda: cluster.load(worker_id).generation_tokens > 3, worker_id)  # noqa: B023
                await move_away(cluster, worker_id)
            await asking
            assert decoded_on(cluster) == [f"colocated-{index}" for index in range(5)]

    asyncio.run(scenario())


def test_a_sequence_that_comes_late_is_sent_on_and_a_worker_that_is_active_again_takes_it(
    checkpoint: TinyCheckpoint,
) -> None:
    request = pb.GenerateRequest(
        request_id="late", prompt_token_ids=checkpoint.prompt(9), sampling=sampling_to_wire(greedily(2))
    )

    async def scenario() -> None:
        async with local_cluster(checkpoint, colocated=1) as cluster:
            worker = cluster.workers["colocated-0"]
            worker.move_away(moves=True)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await cluster.stub("colocated-0").Generate(request).read()
            assert isinstance(error_from_rpc(raised.value), MovedError)
            worker.move_away(moves=False)
            events = [event async for event in cluster.stub("colocated-0").Generate(request)]
            assert tuple(token_id for event in events for token_id in event.token_ids) == checkpoint.greedy(
                checkpoint.prompt(9), 2
            )

    asyncio.run(scenario())
