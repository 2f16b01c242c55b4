"""Bad handoffs over the real wire (F8): refused, counted, retried, and nobody else's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from kvcache.errors import TransferFault
from kvcache.transfer import kv_transfer_pb2_grpc as kv_pb_grpc
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.wire import MAX_MESSAGE_BYTES, Chunk, ChunkRange, Message
from tests.cluster import BLOCK_SIZE, LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.integration.bad_handoffs import PROMPT_TOKENS, REFUSED, Tamper, no_commit
from tests.integration.fake_prefill import FakePrefill, GenerateCall, expect_refusal, fake_prefill, send
from tests.leaks import until

pytestmark = pytest.mark.integration

NUM_TOKENS = 20


@asynccontextmanager
async def cluster_with_fake(
    checkpoint: TinyCheckpoint, lease_ttl_s: float = 10.0
) -> AsyncIterator[tuple[LocalCluster, FakePrefill]]:
    async with (
        fake_prefill() as fake,
        local_cluster(checkpoint, prefill=1, decode=1, lease_ttl_s=lease_ttl_s) as cluster,
    ):
        yield cluster, fake


def call_through(cluster: LocalCluster, fake: FakePrefill, request_id: str = "victim") -> GenerateCall:
    """Asks the decode worker for one token, whose prompt the fake worker shall prefill."""
    prompt = cluster.checkpoint.prompt(PROMPT_TOKENS)
    return GenerateCall(cluster, "decode-0", request_id, prompt, greedily(1), fake.address)


@pytest.mark.parametrize(("tamper", "fault"), REFUSED, ids=[tamper.__name__ for tamper, _ in REFUSED])
def test_a_bad_handoff_is_refused_and_touches_nobody_else(
    checkpoint: TinyCheckpoint, tamper: Tamper, fault: TransferFault
) -> None:
    async def scenario() -> None:
        async with cluster_with_fake(checkpoint) as (cluster, fake):
            other = asyncio.ensure_future(cluster.check_greedy(checkpoint.prompt(40), NUM_TOKENS))
            call = call_through(cluster, fake)
            handoff = await fake.handoffs.get()
            await expect_refusal(cluster, tamper(handoff, checkpoint.spec), fault)
            assert cluster.failures("decode-0") == {fault.value: 1}
            handoff.end(grpc.StatusCode.UNAVAILABLE)
            if tamper is no_commit:  # all was verified, and the request goes on from that
                assert len(await call.finished()) == 1
                assert cluster.load("decode-0").blocks_resumed == PROMPT_TOKENS // BLOCK_SIZE
            else:
                assert (await call.error()).code() is grpc.StatusCode.ABORTED
                assert call.token_ids == []
            await other

    asyncio.run(scenario())


def test_the_untampered_messages_are_accepted(checkpoint: TinyCheckpoint) -> None:
    """What the refusals above are measured against."""

    async def scenario() -> None:
        async with cluster_with_fake(checkpoint) as (cluster, fake):
            call = call_through(cluster, fake)
            handoff = await fake.handoffs.get()
            receipt = await send(cluster.channel("decode-0"), handoff.messages(checkpoint.spec))
            assert receipt.payload_bytes == checkpoint.spec.handoff_bytes(PROMPT_TOKENS)
            handoff.end(grpc.StatusCode.OK)
            assert await call.finished() == (7,)

    asyncio.run(scenario())


def test_a_message_beyond_the_limit_ends_its_stream_only(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with cluster_with_fake(checkpoint) as (cluster, fake):
            other = asyncio.ensure_future(cluster.check_greedy(checkpoint.prompt(40), NUM_TOKENS))
            call = call_through(cluster, fake)
            handoff = await fake.handoffs.get()
            huge = handoff.chunk(0, ChunkRange(0, 0, 5), bytes(MAX_MESSAGE_BYTES))
            async with grpc.aio.insecure_channel(cluster.workers["decode-0"].address) as channel:  # has no such limit
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    await send(channel, [handoff.opening(checkpoint.spec), huge])
            assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            handoff.end(grpc.StatusCode.UNAVAILABLE)
            assert (await call.error()).code() is grpc.StatusCode.ABORTED
            await other

    asyncio.run(scenario())


def test_a_sender_that_vanishes_before_its_commit_leaves_nothing(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with cluster_with_fake(checkpoint) as (cluster, fake):
            call = call_through(cluster, fake)
            handoff = await fake.handoffs.get()
            manager = cluster.workers["decode-0"].manager
            (lease,) = manager.leases
            async with grpc.aio.insecure_channel(cluster.workers["decode-0"].address) as channel:
                sending = kv_pb_grpc.KVTransferStub(channel).Send()
                for message in handoff.messages(checkpoint.spec)[:2]:
                    await sending.write(message)
                await until(lambda: lease.state == "sending", "the decode worker to receive")
            await until(lambda: not lease.is_open, "the decode worker to notice", 1.0)
            # Nobody can go on with it.
            await expect_refusal(cluster, handoff.messages(checkpoint.spec), TransferFault.STALE_EPOCH)
            handoff.end(grpc.StatusCode.UNAVAILABLE)
            assert (await call.error()).code() is grpc.StatusCode.ABORTED

    asyncio.run(scenario())


def test_a_handoff_cannot_be_sent_twice(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with cluster_with_fake(checkpoint) as (cluster, fake):
            call = call_through(cluster, fake)
            handoff = await fake.handoffs.get()
            messages = handoff.messages(checkpoint.spec)
            await send(cluster.channel("decode-0"), messages)
            await expect_refusal(cluster, messages, TransferFault.STALE_EPOCH)
            handoff.end(grpc.StatusCode.OK)
            assert await call.finished() == (7,)

    asyncio.run(scenario())


def test_two_handoffs_interleaved_on_one_connection_are_both_accepted(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with cluster_with_fake(checkpoint) as (cluster, fake):
            calls = [call_through(cluster, fake, request_id) for request_id in ("first", "second")]
            handoffs = [await fake.handoffs.get() for _ in calls]
            stub = kv_pb_grpc.KVTransferStub(cluster.channel("decode-0"))
            sendings = [stub.Send() for _ in handoffs]
            scripts = [handoff.messages(checkpoint.spec) for handoff in handoffs]
            for pair in zip(*scripts, strict=True):
                for sending, message in zip(sendings, pair, strict=True):
                    await sending.write(message)
            for sending in sendings:
                await sending.done_writing()
                assert (await sending).payload_bytes == checkpoint.spec.handoff_bytes(PROMPT_TOKENS)
            for handoff in handoffs:
                handoff.end(grpc.StatusCode.OK)
            assert [await call.finished() for call in calls] == [(7,), (7,)]

    asyncio.run(scenario())


def test_chunks_of_one_handoff_are_refused_in_the_stream_of_another(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with cluster_with_fake(checkpoint) as (cluster, fake):
            calls = [call_through(cluster, fake, request_id) for request_id in ("first", "second")]
            first, second = [await fake.handoffs.get() for _ in calls]
            mixed = [first.opening(checkpoint.spec), *second.messages(checkpoint.spec)[1:]]
            await expect_refusal(cluster, mixed, TransferFault.UNKNOWN_TRANSFER)
            await send(cluster.channel("decode-0"), second.messages(checkpoint.spec))  # untouched by it
            first.end(grpc.StatusCode.UNAVAILABLE)
            second.end(grpc.StatusCode.OK)
            call_of = {call.request_id: call for call in calls}
            assert (await call_of[first.request.request_id].error()).code() is grpc.StatusCode.ABORTED
            assert await call_of[second.request.request_id].finished() == (7,)

    asyncio.run(scenario())


def test_the_late_end_of_a_prefill_call_does_not_end_the_next_request_of_that_id(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with cluster_with_fake(checkpoint) as (cluster, fake):
            for late in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE):
                first = call_through(cluster, fake, "same id")
                first_handoff = await fake.handoffs.get()
                await send(cluster.channel("decode-0"), first_handoff.messages(checkpoint.spec))
                assert await first.finished() == (7,)
                second = call_through(cluster, fake, "same id")
                second_handoff = await fake.handoffs.get()
                first_handoff.end(late)
                await until(lambda n=fake.ended: fake.ended > n, "the first call to end")  # type: ignore[misc]
                await cluster.check_greedy(checkpoint.prompt(40), 5)  # whatever the end led to has happened by now
                await send(cluster.channel("decode-0"), second_handoff.messages(checkpoint.spec))
                second_handoff.end(grpc.StatusCode.OK)
                assert await second.finished() == (7,)

    asyncio.run(scenario())


def test_a_silent_prefill_worker_lets_the_lease_run_out(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with cluster_with_fake(checkpoint, lease_ttl_s=0.4) as (cluster, fake):
            started = time.monotonic()
            call = call_through(cluster, fake)
            handoff = await fake.handoffs.get()
            error = await call.error()
            assert error.code() is grpc.StatusCode.ABORTED
            assert TransferFault.EXPIRED.value in (error.details() or "")
            assert 0.4 <= time.monotonic() - started < 2
            assert not cluster.keeps("victim")
            await until(lambda: fake.cancelled == 1, "the prefill worker to be told")
            # The zombie's late words.
            await expect_refusal(cluster, handoff.messages(checkpoint.spec), TransferFault.STALE_EPOCH)
            await cluster.check_greedy(checkpoint.prompt(40), NUM_TOKENS)

    asyncio.run(scenario())


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_a_prefill_worker_that_ends_without_a_commit_is_an_error_and_no_hang(
    checkpoint: TinyCheckpoint, code: grpc.StatusCode
) -> None:
    async def scenario() -> None:
        async with cluster_with_fake(checkpoint) as (cluster, fake):
            call = call_through(cluster, fake)
            (await fake.handoffs.get()).end(code)
            assert (await call.error(within_s=2)).code() is grpc.StatusCode.ABORTED

    asyncio.run(scenario())


def test_an_address_where_nobody_listens_is_an_error_and_no_hang(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, decode=1) as cluster:
            async with fake_prefill() as fake:
                gone = fake.address
            prompt = checkpoint.prompt(PROMPT_TOKENS)
            call = GenerateCall(cluster, "decode-0", "victim", prompt, greedily(1), gone)
            assert (await call.error(within_s=2)).code() is grpc.StatusCode.ABORTED

    asyncio.run(scenario())


class FlipOnce:
    """Wraps the sender: one bit of the first chunk that is sent at all arrives wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flipped = 0
        next_message = OutgoingTransfer.next_message

        def tampering(transfer: OutgoingTransfer, slot: memoryview | None = None) -> Message | None:
            message = next_message(transfer, slot)
            if isinstance(message, Chunk) and not self.flipped:
                assert isinstance(message.payload, memoryview)
                message.payload[-1] ^= 1
                self.flipped += 1
            return message

        monkeypatch.setattr(OutgoingTransfer, "next_message", tampering)


def test_a_flipped_bit_between_real_workers_costs_a_retry_and_no_token(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        fault = FlipOnce(monkeypatch)
        async with local_cluster(checkpoint, prefill=2, decode=1) as cluster:
            prompts = [checkpoint.prompt(30 + index, seed=index) for index in range(6)]
            await asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))
            assert fault.flipped == 1
            assert cluster.failures("decode-0") == {TransferFault.BAD_CHECKSUM.value: 1}
            assert len(cluster.scheduler.placements) == len(prompts) + 1

    asyncio.run(scenario())
