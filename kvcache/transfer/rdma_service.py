"""The handoff over RDMA: the receiver's side. See ``rdma_port.py``."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress

import grpc

from kvcache.errors import ResourceError, TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.grpc_port import SERVICE, refuse
from kvcache.transfer.rdma_port import METHOD
from kvcache.transfer.receiver import KVReceiver
from kvcache.transfer.registered_memory import RegisteredMemory
from kvcache.transfer.slot_ring import check_inside, check_ring
from kvcache.transfer.wire import Chunk, Message, chunk_from_header

logger = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[pb.RdmaMessage, pb.RdmaReply]


class RdmaService:
    """Takes in handoffs from every worker that has this port. Belongs to one event loop."""

    def __init__(self, receiver: KVReceiver, memory: RegisteredMemory) -> None:
        self._receiver = receiver
        self._memory = memory

    def add_to(self, server: grpc.aio.Server) -> None:
        send: grpc.RpcMethodHandler[pb.RdmaMessage, pb.RdmaReply] = grpc.stream_stream_rpc_method_handler(
            self._send,
            request_deserializer=pb.RdmaMessage.FromString,
            response_serializer=pb.RdmaReply.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: send}),))

    async def _send(self, packets: AsyncIterator[pb.RdmaMessage], context: Context) -> None:
        try:
            async with aclosing(self._messages(packets, context)) as messages:
                receipt = await self._receiver.receive(messages)
        except TransferError as error:
            await refuse(context, error)
        await context.write(pb.RdmaReply(receipt=receipt))

    async def _messages(
        self, packets: AsyncIterator[pb.RdmaMessage], context: Context
    ) -> AsyncGenerator[Message, None]:
        """Every slot is told to be free again when the next message is asked for. Nothing is read before the opening
        has been accepted."""
        landing: _Landing | None = None
        is_open = False
        try:
            async for packet in packets:
                match packet.WhichOneof("message"):
                    case "ring" if landing is None:
                        landing = _Landing(self._memory, packet.ring)
                    case "open":
                        yield packet.open
                        is_open = True
                    case "chunk" if landing is not None and is_open:
                        yield await landing.fetch(packet.chunk)
                        await context.write(pb.RdmaReply(taken=pb.ShmTaken(slot=packet.chunk.slot)))
                    case "commit":
                        yield packet.commit
                    case "chunk":
                        raise TransferError(TransferFault.UNKNOWN_TRANSFER, "a chunk before the ring and the opening")
                    case _:
                        raise TransferError(TransferFault.MALFORMED, "a second ring, or a message without content")
        finally:
            if landing is not None:
                landing.close()


class _Landing:
    """Where the chunks of one handoff come to from the sender's ring, one at a time."""

    def __init__(self, memory: RegisteredMemory, ring: pb.RdmaRing) -> None:
        """
        Raises:
            TransferError: a ring of another shape than there may be, or no memory.
        """
        check_ring(ring.num_slots, ring.slot_bytes)
        self._memory = memory
        self._ring = ring
        try:
            self._buffer = memory.take(ring.slot_bytes)
        except ResourceError as error:
            raise TransferError(TransferFault.ABORTED, str(error)) from None
        self._payload = bytearray(ring.slot_bytes)
        self._reading: asyncio.Future[bool] | None = None

    async def fetch(self, told: pb.ShmChunk) -> Chunk:
        """The payload is a copy in memory that the library does not know: what is verified there is what is used.

        Raises:
            TransferError: the chunk lies outside the ring, or cannot be read.
        """
        ring, num_bytes = self._ring, told.payload_bytes
        check_inside(told, ring.num_slots, ring.slot_bytes)
        if num_bytes:
            await self._read(ring.address + told.slot * ring.slot_bytes, num_bytes)
        payload = memoryview(self._payload)[:num_bytes]
        payload[:] = self._buffer.view[:num_bytes]
        return chunk_from_header(told.chunk, payload)

    async def _read(self, remote_address: int, num_bytes: int) -> None:
        read, session, address = self._memory.remote.read, self._ring.session, self._buffer.address
        self._reading = in_own_thread(lambda: read(session, remote_address, address, num_bytes))
        if not await asyncio.shield(self._reading):
            raise TransferError(TransferFault.PEER_LOST, f"the memory of {session!r} cannot be read")

    def close(self) -> None:
        """A read that is under way, of a handoff that was cancelled, is waited for by nobody."""
        if self._reading is None:
            self._memory.give_back(self._buffer)
        elif self._reading.done():
            self._settle(self._reading)
        else:
            self._reading.add_done_callback(self._settle)

    def _settle(self, reading: asyncio.Future[bool]) -> None:
        if not reading.cancelled() and reading.result():
            self._memory.give_back(self._buffer)
        else:
            self._memory.give_up(self._buffer)


def in_own_thread(work: Callable[[], bool]) -> asyncio.Future[bool]:
    """A thread that hangs holds up neither another handoff nor the end of the process. What ``work`` raises, in a
    library of somebody else's, is logged and a False."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()

    def settle(is_well: bool) -> None:
        if not done.done():
            done.set_result(is_well)

    def run() -> None:
        try:
            is_well = work()
        except Exception:
            logger.exception("The RDMA library failed.")
            is_well = False
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, is_well)

    threading.Thread(target=run, name="kv-read", daemon=True).start()
    return done
