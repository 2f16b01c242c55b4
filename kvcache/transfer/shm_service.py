"""The handoff through shared memory: the receiver's side. See ``shm_port.py``."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from typing import Any

from google.protobuf.message import DecodeError

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.packets import MAX_PACKET_BYTES, POLL_S, PacketReader
from kvcache.transfer.receiver import KVReceiver
from kvcache.transfer.shm_port import is_same_user, socket_name
from kvcache.transfer.slot_ring import MappedRings, SlotRing, check_inside
from kvcache.transfer.wire import Chunk, Message, chunk_from_header

RING_TIMEOUT_S = 10.0  # from a connection to its first message
ACCEPT_PAUSE_S = 0.1  # after a connection that could not be accepted
BACKLOG = 1024
logger = logging.getLogger(__name__)


class ShmService:
    """Takes in handoffs from processes of this user on this host. Belongs to one event loop."""

    def __init__(self, receiver: KVReceiver) -> None:
        self._receiver = receiver
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._rings = MappedRings()

    def start(self, address: str) -> None:
        """``address``: of the worker's gRPC server, by which senders find this.

        Raises:
            OSError: somebody else has the name.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.setblocking(False)
            listener.bind(socket_name(address))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._start_task(self._accept(listener))

    async def stop(self) -> None:
        """Ends the handoffs that are under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sender, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors left, for one: senders wait in the backlog
                logger.warning("A handoff through shared memory cannot be accepted now: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE_S)
            else:
                self._start_task(self._serve(sender))

    async def _serve(self, sender: socket.socket) -> None:
        with sender:
            if not is_same_user(sender):
                logger.warning("Another user's process tried to hand over KV through shared memory.")
                return
            try:
                async with aclosing(self._messages(sender)) as messages:
                    reply = pb.ShmReply(receipt=await self._receiver.receive(messages))
            except TransferError as error:
                reply = pb.ShmReply(refusal=pb.TransferRefusal(fault=error.fault.value, message=error.message))
            except Exception:
                logger.exception("A handoff through shared memory failed unexpectedly.")  # the sender sees the end
                return
            with suppress(OSError):  # the sender has ended
                sender.send(reply.SerializeToString())

    async def _messages(self, sender: socket.socket) -> AsyncGenerator[Message, None]:
        """Every slot is told to be free again when the next message is asked for."""
        with ExitStack() as stack:
            reader = PacketReader(sender)
            stack.callback(reader.close)
            ring = stack.enter_context(self._ring(*await _first_packet(sender, reader)))
            while packet := await reader.receive(self._poll_s):
                message = _parse(packet)
                match message.WhichOneof("message"):
                    case "open":
                        yield message.open
                    case "commit":
                        yield message.commit
                    case "chunk":
                        yield _chunk_in(ring, message.chunk)
                        _tell_taken(sender, message.chunk.slot)
                        await asyncio.sleep(0)  # others' turn
                    case _:
                        raise TransferError(TransferFault.MALFORMED, "a second ring, or a message without content")
            raise TransferError(TransferFault.PEER_LOST, "the sender ended before its commit")

    @property
    def _poll_s(self) -> float:
        """None of it while another handoff has something to do. One task accepts."""
        return POLL_S if len(self._tasks) == 2 else 0.0

    @contextmanager
    def _ring(self, packet: bytes, descriptors: list[int]) -> Iterator[SlotRing]:
        """The memory of the first packet, whose descriptors are closed in the end."""
        try:
            message = _parse(packet)
            if len(descriptors) != 1 or not message.HasField("ring"):
                raise TransferError(TransferFault.MALFORMED, "the first message is no ring with its memory")
            with self._rings.open(descriptors[0], message.ring.slot_bytes, message.ring.num_slots) as ring:
                yield ring
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _tell_taken(sender: socket.socket, slot: int) -> None:
    with suppress(OSError):  # it has ended, as the next read tells; or reads nothing, and will not get its slot back
        sender.send(pb.ShmReply(taken=pb.ShmTaken(slot=slot)).SerializeToString())


def _chunk_in(ring: SlotRing, told: pb.ShmChunk) -> Chunk:
    check_inside(told, len(ring.slots), len(ring.slots[0]))
    return chunk_from_header(told.chunk, ring.slots[told.slot][: told.payload_bytes])


async def _first_packet(sender: socket.socket, reader: PacketReader) -> tuple[bytes, list[int]]:
    """And the file descriptors that came with it, which the caller closes."""
    try:
        async with asyncio.timeout(RING_TIMEOUT_S):
            await reader.wait()
        packet, descriptors, _, _ = socket.recv_fds(sender, MAX_PACKET_BYTES, 1)
    except (TimeoutError, OSError):
        raise TransferError(TransferFault.PEER_LOST, "the sender said nothing") from None
    return packet, descriptors


def _parse(packet: bytes) -> pb.ShmMessage:
    try:
        return pb.ShmMessage.FromString(packet)
    except DecodeError:
        raise TransferError(TransferFault.MALFORMED, f"a packet of {len(packet)} bytes is not protobuf") from None
