"""The handoff over RDMA: the same promises as over gRPC, whatever the library does. Here it is a fake, so that this is
tested everywhere; the real one is in test_rdma_library.py."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import pytest

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as kv_pb
from kvcache.transfer import kv_transfer_pb2_grpc as kv_pb_grpc
from kvcache.transfer import ports
from kvcache.transfer.grpc_port import transfer_error_from
from kvcache.transfer.registered_memory import RegisteredMemory
from tests.cluster import LocalCluster, TinyCheckpoint, local_cluster
from tests.fake_rdma import FakeMemory
from tests.integration.bad_handoffs import REFUSED, Messages, Tamper
from tests.integration.fake_prefill import Handoff, fake_prefill
from tests.integration.test_handoff_faults import FlipOnce, call_through
from tests.leaks import until

pytestmark = pytest.mark.integration

NUM_TOKENS = 10
SLOT_BYTES = 1 << 18
PORT = "rdma-tcp"


@pytest.fixture(autouse=True)
def _fake_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "MooncakeMemory", FakeMemory)


def memory_of(cluster: LocalCluster, worker_id: str) -> RegisteredMemory:
    memory = cluster.workers[worker_id]._memory
    assert memory is not None
    return memory


def fake_of(cluster: LocalCluster, worker_id: str) -> FakeMemory:
    remote = memory_of(cluster, worker_id).remote
    assert isinstance(remote, FakeMemory)
    return remote


def test_the_tokens_are_those_of_the_reference_and_the_payloads_are_read(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, kv_transfer_port=PORT) as cluster:
            prompts = [checkpoint.prompt(60 + index, seed=index) for index in range(4)]
            await asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))
            assert cluster.load("decode-0").transfers == 4
            assert fake_of(cluster, "decode-0").reads >= 4
            assert fake_of(cluster, "prefill-0").reads == 0
            for worker_id in cluster.workers:
                memory = memory_of(cluster, worker_id)
                await until(
                    lambda m=memory: m.free_bytes == sum(m.remote.registered.values()),  # type: ignore[misc]
                    "all buffers to be free",
                )
                assert memory.num_lost == 0

    asyncio.run(scenario())


class RawSender:
    """Speaks the messages themselves, as another engine would."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.memory = RegisteredMemory(FakeMemory())
        self.buffer = self.memory.take(2 * SLOT_BYTES)
        self.call = kv_pb_grpc.KVTransferStub(cluster.channel("decode-0")).SendFromMemory()

    async def send(self, **message: object) -> None:
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # refused already
            await self.call.write(kv_pb.RdmaMessage(**message))  # type: ignore[arg-type]

    async def send_ring(self, **changes: object) -> None:
        ring = {"session": self.memory.remote.session, "address": self.buffer.address, "num_slots": 2}
        await self.send(ring=kv_pb.RdmaRing(**ring | {"slot_bytes": SLOT_BYTES} | changes))  # type: ignore[arg-type]

    async def send_chunk(self, chunk: kv_pb.KVChunk, **changes: int) -> None:
        payload = chunk.payload
        header = kv_pb.KVChunk.FromString(chunk.SerializeToString())
        header.ClearField("payload")
        self.buffer.view[: len(payload)] = payload
        told = {"slot": 0, "payload_bytes": len(payload)} | changes
        await self.send(chunk=kv_pb.ShmChunk(chunk=header, **told))

    async def send_all(self, messages: Messages) -> kv_pb.RdmaReply:
        """Waits for every slot; returns the last reply.

        Raises:
            TransferError: refused.
        """
        for message in messages:
            kind = message.WhichOneof("message")
            if kind == "chunk":
                await self.send_chunk(message.chunk)
                await self.reply()
            else:
                await self.send(**({kind: getattr(message, kind)} if kind else {}))
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self.call.done_writing()
        return await self.reply()

    async def reply(self) -> kv_pb.RdmaReply:
        try:
            reply: kv_pb.RdmaReply = await asyncio.wait_for(self.call.read(), 10)
        except grpc.aio.AioRpcError as error:
            raise transfer_error_from(error) from None
        return reply


@asynccontextmanager
async def raw_handoff(checkpoint: TinyCheckpoint) -> AsyncIterator[tuple[LocalCluster, Handoff, RawSender]]:
    """A handoff that a test sends by hand; its request fails in the end unless the test saw to it."""
    async with (
        fake_prefill() as fake,
        local_cluster(checkpoint, prefill=1, decode=1, kv_transfer_port=PORT) as cluster,
    ):
        call = call_through(cluster, fake)
        handoff = await fake.handoffs.get()
        sender = RawSender(cluster)
        try:
            yield cluster, handoff, sender
        finally:
            sender.call.cancel()
        if not handoff.answer.done():
            handoff.end(grpc.StatusCode.UNAVAILABLE)
            with suppress(grpc.aio.AioRpcError):  # or it goes on from what was verified
                await call.finished()


def test_the_untampered_messages_are_accepted(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (_, handoff, sender):
            await sender.send_ring()
            messages = handoff.messages(checkpoint.spec)
            reply = await sender.send_all(messages)
            assert reply.receipt.payload_bytes == sum(len(each.chunk.payload) for each in messages)
            handoff.end(grpc.StatusCode.OK)

    asyncio.run(scenario())


@pytest.mark.parametrize(("tamper", "fault"), REFUSED, ids=[tamper.__name__ for tamper, _ in REFUSED])
def test_a_bad_handoff_is_refused_as_over_grpc(
    checkpoint: TinyCheckpoint, tamper: Tamper, fault: TransferFault
) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (cluster, handoff, sender):
            await sender.send_ring()
            with pytest.raises(TransferError) as refusal:
                await sender.send_all(tamper(handoff, checkpoint.spec))
            assert refusal.value.fault in (fault, TransferFault.PEER_LOST)  # if a message of ours crosses it
            await until(lambda: bool(cluster.failures("decode-0")), "the refusal to be counted")
            assert cluster.failures("decode-0") == {fault.value: 1}

    asyncio.run(scenario())


@pytest.mark.parametrize(("slot", "payload_bytes"), [(2, 100), (2**32 - 1, 100), (0, SLOT_BYTES + 1), (1, 2**32 - 1)])
def test_a_slot_beyond_the_ring_is_refused_and_not_read(
    checkpoint: TinyCheckpoint, slot: int, payload_bytes: int
) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (cluster, handoff, sender):
            await sender.send_ring()
            opening, first, *_ = handoff.messages(checkpoint.spec)
            await sender.send(open=opening.open)
            await sender.send_chunk(first.chunk, slot=slot, payload_bytes=payload_bytes)
            with pytest.raises(TransferError) as refusal:
                await sender.reply()
            assert refusal.value.fault is TransferFault.OUT_OF_BOUNDS
            assert fake_of(cluster, "decode-0").reads == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("changes", [{"num_slots": 0}, {"num_slots": 17}, {"slot_bytes": 0}, {"slot_bytes": 16 << 20}])
def test_a_ring_of_a_size_that_there_may_not_be_is_refused(checkpoint: TinyCheckpoint, changes: dict[str, int]) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (cluster, _, sender):
            await sender.send_ring(**changes)
            with pytest.raises(TransferError) as refusal:
                await sender.reply()
            assert refusal.value.fault is TransferFault.OUT_OF_BOUNDS
            assert fake_of(cluster, "decode-0").registered == {}

    asyncio.run(scenario())


def test_nothing_is_read_before_the_opening_was_accepted_nor_without_a_ring(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (cluster, handoff, _):
            opening, first, *_ = handoff.messages(checkpoint.spec)
            for opens in (False, True):
                call = RawSender(cluster)
                if opens:
                    await call.send(open=opening.open)
                else:
                    await call.send_ring()
                await call.send_chunk(first.chunk)
                with pytest.raises(TransferError) as refusal:
                    await call.reply()
                assert refusal.value.fault is TransferFault.UNKNOWN_TRANSFER
            assert fake_of(cluster, "decode-0").reads == 0

    asyncio.run(scenario())


def test_a_flipped_bit_costs_a_retry_and_no_token(checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        fault = FlipOnce(monkeypatch)
        async with local_cluster(checkpoint, prefill=2, decode=1, kv_transfer_port=PORT) as cluster:
            prompts = [checkpoint.prompt(30 + index, seed=index) for index in range(4)]
            await asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))
            assert fault.flipped == 1
            assert cluster.failures("decode-0") == {TransferFault.BAD_CHECKSUM.value: 1}

    asyncio.run(scenario())


@pytest.mark.parametrize("raises", [False, True])
def test_a_read_that_fails_costs_a_retry_and_its_buffer_is_never_used_again(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, raises: bool
) -> None:
    """Whether the library says so or throws what it likes: what it may still write to holds nobody's KV."""
    count = itertools.count()

    def fails_once() -> bool:
        is_well = next(count) != 1
        if raises and not is_well:
            raise RuntimeError("the library's own words")
        return is_well

    monkeypatch.setattr(FakeMemory, "before_read", fails_once)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=2, decode=1, kv_transfer_port=PORT) as cluster:
            prompts = [checkpoint.prompt(30 + index, seed=index) for index in range(4)]
            await asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))
            assert cluster.failures("decode-0") == {TransferFault.PEER_LOST.value: 1}
            memory = memory_of(cluster, "decode-0")
            assert memory.num_lost == 1
            (lost,) = [each for each in memory._all if each.address not in fake_of(cluster, "decode-0").registered]
            ctypes.memset(lost.address, 0xFF, len(lost.view))  # the late write
            await cluster.check_greedy(checkpoint.prompt(50, seed=9), NUM_TOKENS)

    asyncio.run(scenario())
    assert ("the library's own words" in caplog.text) is raises


def test_a_read_that_never_returns_holds_nobody_else_up(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    goes_on = threading.Event()

    def first_hangs() -> bool:
        if not hangs.is_set():
            hangs.set()
            return not goes_on.wait(30)
        return True

    monkeypatch.setattr(FakeMemory, "before_read", first_hangs)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=2, decode=1, lease_ttl_s=0.6, kv_transfer_port=PORT) as cluster:
            victim = asyncio.create_task(cluster.check_greedy(checkpoint.prompt(300), NUM_TOKENS))
            await until(hangs.is_set, "a read to hang")
            await cluster.check_greedy(checkpoint.prompt(40), NUM_TOKENS)
            assert not victim.done()
            await victim  # given up after a lease, and sent again
            assert not goes_on.is_set()
            assert len(cluster.scheduler.placements) == 3
            memory = memory_of(cluster, "decode-0")
            assert memory.num_lost == 0  # not known yet
            goes_on.set()
            await until(lambda: memory.num_lost == 1, "the late failure to be seen")

    try:
        asyncio.run(scenario())
    finally:
        goes_on.set()


def test_a_sender_that_vanishes_half_way_leaves_nothing(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (cluster, handoff, sender):
            (lease,) = cluster.workers["decode-0"].manager.leases
            await sender.send_ring()
            await sender.send(open=handoff.messages(checkpoint.spec)[0].open)
            await until(lambda: lease.state == "sending", "the decode worker to receive")
            sender.call.cancel()
            await until(lambda: not lease.is_open, "the decode worker to notice", 2.0)
            memory = memory_of(cluster, "decode-0")
            await until(lambda: memory.free_bytes > 0, "the buffer to be given back")
            assert cluster.failures("decode-0") == {TransferFault.PEER_LOST.value: 1}

    asyncio.run(scenario())


def test_memory_that_cannot_be_had_is_an_error_that_says_so(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, kv_transfer_port=PORT) as cluster:
            fake_of(cluster, "prefill-0").room_bytes = 0
            with pytest.raises(Exception, match="no room"):
                await cluster.check_greedy(checkpoint.prompt(40), NUM_TOKENS)

    asyncio.run(scenario())
