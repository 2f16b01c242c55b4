"""The handoff over RDMA: the sender's side. Messages go over gRPC, and the receiver reads the payloads.

::

    sender                                                            receiver
      │ ── RdmaRing: where two registered slots lie ───────────────────► │
      │ ── TransferOpen ───────────────────────────────────────────────► │   checks: lease, spec, blocks
      │    gathers blocks into slot 0                                    │
      │ ── ShmChunk: slot 0 ───────────────────────────────────────────► │
      │ ◄════════════════════════════════════════════ reads slot 0 ════  │   copies, verifies, scatters
      │    gathers blocks into slot 1                                    │
      │ ◄──────────────────────────────────────────── ShmTaken: slot 0 ─ │
      │ ── TransferCommit ─────────────────────────────────────────────► │
      │ ◄───────────────────────────────────────────── TransferReceipt ─ │

The receiver reads rather than the sender writes, so that a sender which was taken for dead cannot write anywhere when
it goes on: its slots are its own, and nobody reads them any more. A refusal ends the call, as over gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from kvcache.errors import ResourceError, TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.grpc_port import SERVICE, transfer_error_from
from kvcache.transfer.port import Outlet, Patience
from kvcache.transfer.registered_memory import Buffer, RegisteredMemory
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.wire import Chunk, Message, chunk_header

METHOD = "SendFromMemory"
NUM_SLOTS = 2  # one is filled while the other is taken
Call = grpc.aio.StreamStreamCall[Any, pb.RdmaReply]


class RdmaPort:
    """A ``KVPort`` to every worker that has this port too."""

    def __init__(self, memory: RegisteredMemory, channel_to: Callable[[str], grpc.aio.Channel]) -> None:
        self._memory = memory
        self._channel_to = channel_to

    async def open(self, transfer: OutgoingTransfer, on_end: Callable[[], None]) -> Outlet:
        """See ``KVPort``. Returns at once: whether anybody is there is seen later."""
        slot_bytes = transfer.slot_bytes(NUM_SLOTS)
        call = self._call(transfer.target.address)
        try:
            buffer = self._memory.take(NUM_SLOTS * slot_bytes)
        except ResourceError as error:
            call.cancel()
            raise TransferError(TransferFault.ABORTED, str(error)) from None
        return _RdmaOutlet(call, self._memory, buffer, slot_bytes, on_end)

    def _call(self, address: str) -> Call:
        """Not a registered method; see ``GrpcPort.open``."""
        send: grpc.aio.StreamStreamMultiCallable[Any, pb.RdmaReply] = self._channel_to(address).stream_stream(
            f"/{SERVICE}/{METHOD}",
            request_serializer=pb.RdmaMessage.SerializeToString,
            response_deserializer=pb.RdmaReply.FromString,
        )
        try:
            return send()
        except grpc.aio.UsageError:
            raise TransferError(TransferFault.PEER_LOST, "the connection is closed") from None


class _RdmaOutlet:
    def __init__(
        self, call: Call, memory: RegisteredMemory, buffer: Buffer, slot_bytes: int, on_end: Callable[[], None]
    ) -> None:
        self._call = call
        self._memory = memory
        self._buffer = buffer
        self._slot_bytes = slot_bytes
        self._free = list(range(NUM_SLOTS))  # the one that was free last is taken first: it is in the caches
        self._has_news = asyncio.Event()
        self._on_end = on_end
        self._outcome = asyncio.create_task(self._read_replies())
        self._outcome.add_done_callback(self._tell_end)

    @property
    def has_ended(self) -> bool:
        return self._outcome.done()

    async def slot(self, patience: Patience) -> memoryview:
        while not self._free and not self.has_ended:
            self._has_news.clear()
            await self._has_news.wait()
        start = (self._free[-1] if self._free else 0) * self._slot_bytes
        return self._buffer.view[start : start + self._slot_bytes]

    async def put(self, message: Message) -> None:
        """A chunk's payload lies in the slot that ``slot`` gave last."""
        if self.has_ended:
            return
        if isinstance(message, Chunk):
            slot = self._free.pop()
            told = pb.ShmChunk(chunk=chunk_header(message), slot=slot, payload_bytes=len(message.payload))
            await self._write(pb.RdmaMessage(chunk=told))
        elif isinstance(message, pb.TransferOpen):
            await self._write(pb.RdmaMessage(ring=self._ring()))
            await self._write(pb.RdmaMessage(open=message))
        else:
            await self._write(pb.RdmaMessage(commit=message))

    async def receipt(self) -> int:
        return await asyncio.shield(self._outcome)

    def close(self) -> None:
        """Whoever still reads the slots has not understood that this has ended, and verifies what it gets."""
        self._call.cancel()
        self._outcome.cancel()
        self._memory.give_back(self._buffer)

    def _ring(self) -> pb.RdmaRing:
        return pb.RdmaRing(
            session=self._memory.remote.session,
            address=self._buffer.address,
            num_slots=NUM_SLOTS,
            slot_bytes=self._slot_bytes,
        )

    async def _write(self, message: pb.RdmaMessage) -> None:
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # ended already: the outcome tells why
            await self._call.write(message)

    async def _read_replies(self) -> int:
        """Returns the payload bytes of the receipt."""
        try:
            async for reply in self._call:
                if reply.HasField("receipt"):
                    return reply.receipt.payload_bytes
                self._take_back(reply.taken.slot)
        except grpc.aio.AioRpcError as error:
            raise transfer_error_from(error) from None
        raise TransferError(TransferFault.PEER_LOST, "the receiver ended without a receipt")

    def _take_back(self, slot: int) -> None:
        if slot >= NUM_SLOTS or slot in self._free:
            raise TransferError(TransferFault.MALFORMED, f"the receiver gives back slot {slot}, which it does not have")
        self._free.append(slot)
        self._has_news.set()

    def _tell_end(self, outcome: asyncio.Task[int]) -> None:
        if not outcome.cancelled():
            outcome.exception()  # somebody has looked
        self._has_news.set()
        self._on_end()
