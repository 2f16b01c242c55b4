"""The loop that all ports share, through the port that needs no connection: bounded, patient with computing, not with
a receiver that takes nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from kvcache.errors import TransferError, TransferFault
from kvcache.lease import LeaseState
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.inproc_port import InProcessPort
from kvcache.transfer.port import send_kv
from kvcache.transfer.receiver import KVReceiver, ReceivedKV
from kvcache.transfer.sender import OutgoingTransfer, PrefillOutcome
from kvcache.transfer.wire import Chunk, Message
from tests.unit.kvcache.handoff import FIRST_TOKEN_ID, REQUEST_ID, SPEC, Handoff

ADDRESS = "nowhere:1"  # of ``Handoff.outgoing``
NUM_CHUNKS = 6  # of one block each
PATIENT_S, IMPATIENT_S = 30.0, 0.05


class SlowReceiver(KVReceiver):
    """Takes ``num_free`` chunks and then nothing until it is released."""

    num_free = 0
    released: asyncio.Event

    async def receive(self, messages: AsyncIterator[Message]) -> pb.TransferReceipt:
        return await super().receive(self._held(messages))

    async def _held(self, messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
        num_chunks = 0
        async for message in messages:
            num_chunks += isinstance(message, Chunk)
            if num_chunks > self.num_free:
                await self.released.wait()
            yield message


class Ends:
    """Both ends of one handoff, joined by the port."""

    def __init__(self, handoff: Handoff, num_free: int = 1000) -> None:
        self.received: list[ReceivedKV] = []
        self.failures: Counter[TransferFault] = Counter()
        target = handoff.target
        self.receiver = SlowReceiver(target.manager, target.storage, lambda: 0.0, self.received.append, self.failures)
        self.receiver.num_free, self.receiver.released = num_free, asyncio.Event()
        self.outgoing = OutgoingTransfer(
            handoff.source.storage, handoff.source_lease, handoff.outgoing().target, max_chunk_bytes=1
        )
        self.port = InProcessPort({ADDRESS: self.receiver})

    async def send(self, stall_timeout_s: float = PATIENT_S) -> int:
        return await send_kv(self.port, self.outgoing, stall_timeout_s)


async def quiesce() -> None:
    """All that can happen without a clock has happened."""
    for _ in range(100):
        await asyncio.sleep(0)


def counting_chunks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    made: Counter[str] = Counter()
    next_message = OutgoingTransfer.next_message

    def counted(transfer: OutgoingTransfer, slot: memoryview | None = None) -> Message | None:
        message = next_message(transfer, slot)
        made["chunks"] += isinstance(message, Chunk)
        return message

    monkeypatch.setattr(OutgoingTransfer, "next_message", counted)
    return made


def test_everything_arrives_and_is_acknowledged(handoff: Handoff) -> None:
    async def scenario() -> None:
        ends = Ends(handoff)
        ends.outgoing.complete(PrefillOutcome(FIRST_TOKEN_ID))
        assert await ends.send() == sum(map(len, handoff.expected)) == ends.receiver.payload_bytes
        assert [received.request_id for received in ends.received] == [REQUEST_ID]
        assert handoff.target.read(REQUEST_ID) == handoff.expected
        assert ends.receiver.bytes_under_way == 0

    asyncio.run(scenario())


def test_a_slow_receiver_slows_the_sender_which_holds_two_chunks_at_most(
    handoff: Handoff, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counting_chunks(monkeypatch)

    async def scenario() -> None:
        ends = Ends(handoff, num_free=1)
        ends.outgoing.complete(PrefillOutcome(FIRST_TOKEN_ID))
        sending = asyncio.create_task(ends.send())
        await quiesce()
        of_the_receiver = 2  # one that is written, one that it looks at
        assert 0 < made["chunks"] - of_the_receiver <= 2
        assert made["chunks"] < NUM_CHUNKS
        assert ends.receiver.bytes_under_way > 0
        ends.receiver.released.set()
        assert await sending == sum(map(len, handoff.expected))

    asyncio.run(scenario())


def test_computing_may_take_longer_than_the_receiver_may(handoff: Handoff) -> None:
    async def scenario() -> None:
        ends = Ends(handoff)
        sending = asyncio.create_task(ends.send(IMPATIENT_S))
        await asyncio.sleep(3 * IMPATIENT_S)
        assert not sending.done()
        ends.outgoing.complete(PrefillOutcome(FIRST_TOKEN_ID))
        assert await sending == sum(map(len, handoff.expected))

    asyncio.run(scenario())


def test_a_receiver_that_takes_nothing_is_given_up(handoff: Handoff) -> None:
    async def scenario() -> None:
        ends = Ends(handoff, num_free=0)
        ends.outgoing.complete(PrefillOutcome(FIRST_TOKEN_ID))
        with pytest.raises(TransferError) as caught:
            await ends.send(IMPATIENT_S)
        assert caught.value.fault is TransferFault.EXPIRED
        await quiesce()
        assert handoff.target_lease.state is LeaseState.ABORTED
        assert ends.failures == {TransferFault.PEER_LOST: 1}

    asyncio.run(scenario())


def test_a_refusal_is_noticed_while_nothing_is_computed(handoff: Handoff) -> None:
    async def scenario() -> None:
        ends = Ends(handoff)
        ends.outgoing.mark_ready(1, 1)
        sending = asyncio.create_task(ends.send())
        await quiesce()
        handoff.target.manager.leases.abort(handoff.target_lease)
        ends.outgoing.mark_ready(1, 2)
        with pytest.raises(TransferError) as caught:
            await sending
        assert caught.value.fault is TransferFault.STALE_EPOCH
        assert ends.failures == {TransferFault.STALE_EPOCH: 1}

    asyncio.run(scenario())


def test_a_transfer_that_is_given_up_ends_on_the_other_side_too(handoff: Handoff) -> None:
    async def scenario() -> None:
        ends = Ends(handoff)
        ends.outgoing.mark_ready(1, 2)
        sending = asyncio.create_task(ends.send())
        await quiesce()
        assert handoff.target_lease.state is LeaseState.SENDING
        sending.cancel()
        await quiesce()
        assert handoff.target_lease.state is LeaseState.ABORTED

    asyncio.run(scenario())


def test_an_address_without_a_receiver_is_a_lost_peer(handoff: Handoff) -> None:
    async def scenario() -> None:
        with pytest.raises(TransferError) as caught:
            await send_kv(InProcessPort({}), handoff.outgoing(), PATIENT_S)
        assert caught.value.fault is TransferFault.PEER_LOST

    asyncio.run(scenario())


def test_a_chunk_is_no_longer_than_its_slot(handoff: Handoff) -> None:
    outgoing = handoff.outgoing()
    outgoing.complete(PrefillOutcome(FIRST_TOKEN_ID))
    assert isinstance(outgoing.next_message(), pb.TransferOpen)
    slot = memoryview(bytearray(SPEC.layer_block_bytes + 7))
    for _ in range(NUM_CHUNKS):
        chunk = outgoing.next_message(slot)
        assert isinstance(chunk, Chunk)
        assert (chunk.num_blocks, len(chunk.payload)) == (1, SPEC.layer_block_bytes)
        assert slot[: len(chunk.payload)] == chunk.payload
    assert isinstance(outgoing.next_message(slot), pb.TransferCommit)
