"""The handoff through shared memory: the same promises as over gRPC, and none left when either side dies."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as kv_pb
from kvcache.transfer import shm_port, shm_service
from kvcache.transfer.port_choice import HAS_SHM, PortName
from kvcache.transfer.shm_port import socket_name
from kvcache.transfer.slot_pool import NUM_SLOTS, SlotPool
from kvcache.transfer.slot_ring import SlotRing
from kvcache.transfer.wire import ChunkRange, make_chunk
from tests.builders import CountedPatience
from tests.cluster import LocalCluster, TinyCheckpoint, local_cluster
from tests.integration.bad_handoffs import REFUSED, Messages, Tamper
from tests.integration.fake_prefill import FakePrefill, Handoff, fake_prefill
from tests.integration.ports import Opened
from tests.integration.test_handoff_faults import FlipOnce, call_through
from tests.leaks import until

pytestmark = [pytest.mark.integration, pytest.mark.skipif(not HAS_SHM, reason="Linux only")]

NUM_TOKENS = 10
SLOT_BYTES = 1 << 18


@asynccontextmanager
async def cluster_with_fake(checkpoint: TinyCheckpoint) -> AsyncIterator[tuple[LocalCluster, FakePrefill]]:
    async with fake_prefill() as fake, local_cluster(checkpoint, prefill=1, decode=1) as cluster:
        yield cluster, fake


class RawSender:
    """Speaks the packets themselves, as another engine would."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.socket.connect(socket_name(address))
        self.ring, self._descriptor = SlotRing.create(SLOT_BYTES, 2)

    def send(self, **message: object) -> None:
        self.socket.send(kv_pb.ShmMessage(**message).SerializeToString())  # type: ignore[arg-type]

    def send_ring(self, **changes: int) -> None:
        ring = kv_pb.ShmRing(**{"num_slots": 2, "slot_bytes": SLOT_BYTES} | changes)
        socket.send_fds(self.socket, [kv_pb.ShmMessage(ring=ring).SerializeToString()], [self._descriptor])

    async def reply(self) -> kv_pb.ShmReply | None:
        """The next; None: the end."""
        try:
            packet = await self._packet()
        except ConnectionResetError:  # it left packets of ours unread; its last words come after this
            packet = await self._packet()
        return kv_pb.ShmReply.FromString(packet) if packet else None

    async def _packet(self) -> bytes:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.socket, 4096), 10)

    async def send_all(self, messages: Messages) -> kv_pb.ShmReply | None:
        """Waits for every slot; returns the last word."""
        reply: kv_pb.ShmReply | None = None
        for message in messages:
            kind = message.WhichOneof("message")
            try:
                if kind == "chunk":
                    self._send_chunk(message.chunk)
                elif kind is None:
                    self.send()
                else:
                    self.send(**{kind: getattr(message, kind)})
            except OSError:  # refused already
                break
            if kind == "chunk":
                reply = await self.reply()
                if reply is None or reply.HasField("refusal"):
                    return reply
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        return await self.reply()

    def _send_chunk(self, chunk: kv_pb.KVChunk) -> None:
        payload = chunk.payload
        header = kv_pb.KVChunk.FromString(chunk.SerializeToString())
        header.ClearField("payload")
        self.ring.slots[0][: len(payload)] = payload
        self.send(chunk=kv_pb.ShmChunk(chunk=header, slot=0, payload_bytes=len(payload)))

    def close(self) -> None:
        self.socket.close()
        self.ring.close()
        os.close(self._descriptor)


@asynccontextmanager
async def raw_handoff(checkpoint: TinyCheckpoint) -> AsyncIterator[tuple[LocalCluster, Handoff, RawSender]]:
    """A handoff that a test sends by hand; its request fails in the end unless the test saw to it."""
    async with cluster_with_fake(checkpoint) as (cluster, fake):
        call = call_through(cluster, fake)
        handoff = await fake.handoffs.get()
        sender = RawSender(cluster.workers["decode-0"].address)
        try:
            yield cluster, handoff, sender
        finally:
            sender.close()
        if not handoff.answer.done():
            handoff.end(grpc.StatusCode.UNAVAILABLE)
            with suppress(grpc.aio.AioRpcError):  # or it goes on from what was verified
                await call.finished()


async def check_refused(sender: RawSender, fault: TransferFault) -> None:
    reply = await sender.reply()
    assert reply is not None and reply.refusal.fault == fault.value
    assert await sender.reply() is None


def test_the_untampered_packets_are_accepted(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (_, handoff, sender):
            sender.send_ring()
            messages = handoff.messages(checkpoint.spec)
            reply = await sender.send_all(messages)
            assert reply is not None and reply.receipt.payload_bytes == sum(
                len(each.chunk.payload) for each in messages
            )
            handoff.end(grpc.StatusCode.OK)

    asyncio.run(scenario())


@pytest.mark.parametrize(("tamper", "fault"), REFUSED, ids=[tamper.__name__ for tamper, _ in REFUSED])
def test_a_bad_handoff_is_refused_as_over_grpc(
    checkpoint: TinyCheckpoint, tamper: Tamper, fault: TransferFault
) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (cluster, handoff, sender):
            sender.send_ring()
            reply = await sender.send_all(tamper(handoff, checkpoint.spec))
            is_end = tamper.__name__ == "empty_message"  # on a socket
            fault_here = TransferFault.PEER_LOST if is_end else fault
            assert reply is not None and reply.refusal.fault == fault_here.value
            assert cluster.failures("decode-0") == {fault_here.value: 1}

    asyncio.run(scenario())


@pytest.mark.parametrize(("slot", "payload_bytes"), [(2, 100), (2**32 - 1, 100), (0, SLOT_BYTES + 1), (1, 2**32 - 1)])
def test_a_slot_beyond_the_ring_is_refused(checkpoint: TinyCheckpoint, slot: int, payload_bytes: int) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (_, handoff, sender):
            sender.send_ring()
            opening, first, *_ = handoff.messages(checkpoint.spec)
            sender.send(open=opening.open)
            header = kv_pb.KVChunk.FromString(first.chunk.SerializeToString())
            header.ClearField("payload")
            sender.send(chunk=kv_pb.ShmChunk(chunk=header, slot=slot, payload_bytes=payload_bytes))
            await check_refused(sender, TransferFault.OUT_OF_BOUNDS)

    asyncio.run(scenario())


def test_a_ring_that_is_not_as_it_was_said_is_refused(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (_, _, sender):
            sender.send_ring(num_slots=3)
            await check_refused(sender, TransferFault.INCOMPATIBLE)

    asyncio.run(scenario())


@pytest.mark.parametrize("packet", [b"\xff\xff\xff", b"x" * 5000, kv_pb.ShmMessage(open={}).SerializeToString()])
def test_a_first_packet_that_is_no_ring_is_refused(checkpoint: TinyCheckpoint, packet: bytes) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (_, _, sender):
            sender.socket.send(packet)
            await check_refused(sender, TransferFault.MALFORMED)

    asyncio.run(scenario())


def test_a_sender_that_dies_half_way_leaves_nothing(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (cluster, handoff, sender):
            (lease,) = cluster.workers["decode-0"].manager.leases
            sender.send_ring()
            sender.send(open=handoff.messages(checkpoint.spec)[0].open)
            await until(lambda: lease.state == "sending", "the decode worker to receive")
            sender.socket.close()
            await until(lambda: not lease.is_open, "the decode worker to notice", 2.0)
            assert cluster.failures("decode-0") == {TransferFault.PEER_LOST.value: 1}
            sender.socket = socket.socket()  # for the end

    asyncio.run(scenario())


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """To this process; those that it has stay open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_handoff_that_comes_while_no_descriptor_is_left_is_taken_when_there_are_some(
    checkpoint: TinyCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (_, handoff, sender):
            with no_descriptors_left():
                await until(lambda: "cannot be accepted" in caplog.text, "the decode worker to notice")
            sender.send_ring()
            reply = await sender.send_all(handoff.messages(checkpoint.spec))
            assert reply is not None and reply.HasField("receipt")
            handoff.end(grpc.StatusCode.OK)

    asyncio.run(scenario())


def test_another_users_process_is_not_heard(checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_service, "is_same_user", lambda peer: False)

    async def scenario() -> None:
        async with raw_handoff(checkpoint) as (cluster, _, sender):
            sender.send_ring()
            assert await sender.reply() is None
            assert cluster.failures("decode-0") == {}

    asyncio.run(scenario())


def shared_mappings() -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("twinpool-kv")


@pytest.mark.parametrize(("port", "expected"), [("auto", (0, 4)), ("shm", (0, 4)), ("grpc", (4, 0))])
def test_every_port_gives_the_reference_answer(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, port: PortName, expected: tuple[int, int]
) -> None:
    opened = Opened(monkeypatch)
    before = shared_mappings()

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, kv_transfer_port=port) as cluster:
            prompts = [checkpoint.prompt(60 + index, seed=index) for index in range(4)]
            await asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))
            assert (opened.grpc, opened.shm) == expected
            assert cluster.load("decode-0").transfers == 4
            await until(lambda: shared_mappings() <= before, "the shared memory to be given back")

    asyncio.run(scenario())


def test_a_worker_of_another_user_or_host_is_reached_over_grpc(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm_port, "is_same_user", lambda peer: False)
    opened = Opened(monkeypatch)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            await cluster.check_greedy(checkpoint.prompt(40), NUM_TOKENS)
            assert (opened.grpc, opened.shm) == (1, 0)

    asyncio.run(scenario())


def test_shared_memory_that_was_asked_for_and_cannot_be_had_is_an_error_that_says_so(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm_port, "is_same_user", lambda peer: False)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, kv_transfer_port="shm") as cluster:
            with pytest.raises(Exception, match="no process of this user on this host"):
                await cluster.check_greedy(checkpoint.prompt(40), NUM_TOKENS)

    asyncio.run(scenario())


@pytest.mark.parametrize("port", ["shm", "grpc"])
def test_a_flipped_bit_costs_a_retry_and_no_token(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, port: PortName
) -> None:
    async def scenario() -> None:
        fault = FlipOnce(monkeypatch)
        async with local_cluster(checkpoint, prefill=2, decode=1, kv_transfer_port=port) as cluster:
            prompts = [checkpoint.prompt(30 + index, seed=index) for index in range(4)]
            await asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))
            assert fault.flipped == 1
            assert cluster.failures("decode-0") == {TransferFault.BAD_CHECKSUM.value: 1}

    asyncio.run(scenario())


def test_a_receiver_that_ends_without_a_word_is_a_lost_peer() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        pool = SlotPool(SLOT_BYTES)
        pool.join()
        ended = asyncio.Event()
        outlet = shm_port._ShmOutlet(ours, pool, ended.set, lambda: None)
        await outlet.put(kv_pb.TransferOpen(transfer_id="t"))
        theirs.close()  # with the opening unread
        await asyncio.wait_for(ended.wait(), 10)
        with pytest.raises(TransferError) as caught:
            await outlet.receipt()
        assert caught.value.fault is TransferFault.PEER_LOST
        outlet.close()

    asyncio.run(scenario())


def test_a_slot_that_the_receiver_may_still_read_is_nobody_elses_until_it_has_ended() -> None:
    """What it has verified it copies afterwards: another transfer's bytes must not come in between."""

    async def scenario() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        pool = SlotPool(SLOT_BYTES)
        pool.join()
        gone = asyncio.Event()
        outlet = shm_port._ShmOutlet(ours, pool, lambda: None, gone.set)
        slot = await outlet.slot(CountedPatience())
        await outlet.put(make_chunk("t", 1, 0, ChunkRange(0, 0, 1), slot[:8]))
        sent = kv_pb.ShmMessage.FromString(theirs.recv(4096)).chunk.slot
        outlet.close()
        free: list[int] = []
        for _ in range(NUM_SLOTS):
            pool.turns.ask(free.append)
        assert sorted((*free, sent)) == list(range(NUM_SLOTS))
        assert theirs.recv(4096) == b""  # the receiver is told at once
        assert not gone.is_set()
        theirs.close()
        await asyncio.wait_for(gone.wait(), 10)
        assert free[-1] == sent
        assert pool.leave()

    asyncio.run(scenario())


def test_a_receiver_that_gives_back_what_it_was_not_given_is_not_believed() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        pool = SlotPool(SLOT_BYTES)
        pool.join()
        outlet = shm_port._ShmOutlet(ours, pool, lambda: None, lambda: None)
        theirs.send(kv_pb.ShmReply(taken={"slot": 1}).SerializeToString())
        with pytest.raises(TransferError) as caught:
            await asyncio.wait_for(outlet.receipt(), 10)
        assert caught.value.fault is TransferFault.MALFORMED
        theirs.close()
        outlet.close()

    asyncio.run(scenario())
