"""The handoff through shared memory, to a worker of the same user on the same host: the sender's side.

::

    sender                                                            receiver
      │ ── connects to the Unix socket named after its address ────────► │   each looks at the other's user id
      │ ── ShmRing + file descriptor of two slots  ────────────────────► │   maps them for reading
      │ ── TransferOpen ───────────────────────────────────────────────► │
      │    gathers blocks into slot 0                                    │
      │ ── ShmChunk: slot 0 ───────────────────────────────────────────► │   verifies, scatters into its blocks
      │    gathers blocks into slot 1                                    │
      │ ◄──────────────────────────────────────────── ShmTaken: slot 0 ─ │
      │ ── TransferCommit ─────────────────────────────────────────────► │
      │ ◄───────────────────────────────────────────── TransferReceipt ─ │

The socket's name is in Linux's abstract namespace: only processes in the receiver's own network namespace find it, and
nothing of it is left when a process ends. The other one learns that at once, by the end of the socket.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.packets import MAX_PACKET_BYTES, POLL_S
from kvcache.transfer.port import Outlet
from kvcache.transfer.port_choice import HAS_SHM
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.slot_ring import NUM_SLOTS, SlotRing
from kvcache.transfer.wire import Chunk, Message, chunk_header

_CREDENTIALS = struct.Struct("3i")  # process, user, group


def socket_name(address: str) -> str:
    """Of the worker that serves gRPC at ``address``."""
    return f"\0twinpool-kv/{address}"


def is_same_user(peer: socket.socket) -> bool:
    """As the kernel says."""
    _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(user == os.geteuid())


class ShmPort:
    """A ``KVPort`` to workers of this user on this host."""

    def __init__(self) -> None:
        self._open: set[Outlet] = set()

    async def open(self, transfer: OutgoingTransfer, on_end: Callable[[], None]) -> Outlet:
        """See ``KVPort``."""
        outlet = self.try_open(transfer, on_end)
        if outlet is None:
            raise TransferError(
                TransferFault.PEER_LOST,
                f"no process of this user on this host takes KV for {transfer.target.address} through shared memory",
            )
        return outlet

    def try_open(self, transfer: OutgoingTransfer, on_end: Callable[[], None]) -> Outlet | None:
        """None: the target is not on this host, or another user's, or takes nothing in this way."""
        peer = _connect(transfer.target.address)
        if peer is None:
            return None
        try:
            slot_bytes = transfer.slot_bytes(NUM_SLOTS)
            ring, descriptor = SlotRing.create(slot_bytes)
            try:
                shape = pb.ShmRing(num_slots=len(ring.slots), slot_bytes=slot_bytes)
                socket.send_fds(peer, [pb.ShmMessage(ring=shape).SerializeToString()], [descriptor])
            finally:
                os.close(descriptor)
        except OSError:  # no memory, no descriptors, or the other side has ended
            peer.close()
            return None
        return _ShmOutlet(peer, ring, on_end, self._open)


def _connect(address: str) -> socket.socket | None:
    if not HAS_SHM:
        return None
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.setblocking(False)
    try:
        peer.connect(socket_name(address))
        if is_same_user(peer):
            return peer
    except OSError:
        pass
    peer.close()
    return None


class _ShmOutlet:
    def __init__(self, peer: socket.socket, ring: SlotRing, on_end: Callable[[], None], is_open: set[Outlet]) -> None:
        """``is_open``: this one is in it until it is closed, beside the others of the port."""
        self._peer = peer
        self._ring = ring
        self._on_end = on_end
        self._free = list(range(len(ring.slots)))  # the one that was free last is taken first: it is in the caches
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[int] = self._loop.create_future()
        self._has_news = asyncio.Event()
        self._loop.add_reader(peer, self._read)
        self._is_open = is_open
        is_open.add(self)

    @property
    def has_ended(self) -> bool:
        return self._outcome.done()

    async def slot(self) -> memoryview:
        if len(self._is_open) > 1 or not self._free:
            await asyncio.sleep(0)  # others' turn
        self._poll()
        while not self._free and not self.has_ended:
            self._has_news.clear()
            await self._has_news.wait()
        return self._ring.slots[self._free[-1] if self._free else 0]

    def _poll(self) -> None:
        """Looks for a free slot before ``slot`` sleeps, unless another transfer has something to do meanwhile."""
        deadline_s = time.perf_counter() + (POLL_S if len(self._is_open) == 1 else 0.0)
        while not self._free and not self.has_ended and time.perf_counter() < deadline_s:
            os.sched_yield()  # to the receiver, where there is no core for it
            self._read()

    async def put(self, message: Message) -> None:
        """A chunk's payload lies in the slot that ``slot`` gave last."""
        if self.has_ended:
            return
        if isinstance(message, Chunk):
            slot = self._free.pop()
            told = pb.ShmChunk(chunk=chunk_header(message), slot=slot, payload_bytes=len(message.payload))
            packet = pb.ShmMessage(chunk=told)
        elif isinstance(message, pb.TransferOpen):
            packet = pb.ShmMessage(open=message)
        else:
            packet = pb.ShmMessage(commit=message)
        try:
            await self._loop.sock_sendall(self._peer, packet.SerializeToString())
        except OSError:
            self._read()  # the other side has ended: it may have said why

    async def receipt(self) -> int:
        return await self._outcome

    def close(self) -> None:
        if not self._outcome.done():
            self._outcome.cancel()
        elif not self._outcome.cancelled():
            self._outcome.exception()  # somebody has looked
        self._is_open.discard(self)
        self._loop.remove_reader(self._peer)
        self._peer.close()
        self._ring.close()

    def _read(self) -> None:
        while not self.has_ended:
            try:
                packet = self._peer.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it left some of ours unread; its own last words come after this
                continue
            except OSError as error:
                self._fail(TransferFault.PEER_LOST, f"the socket to the receiver broke: {error}")
                return
            self._take(packet)

    def _take(self, packet: bytes) -> None:
        try:
            reply = pb.ShmReply.FromString(packet)
        except DecodeError:
            self._fail(TransferFault.MALFORMED, "the receiver's answer is not protobuf")
            return
        match reply.WhichOneof("reply"):
            case "taken":
                self._free.append(reply.taken.slot)
                self._has_news.set()
            case "receipt":
                self._outcome.set_result(reply.receipt.payload_bytes)
                self._tell_end()
            case "refusal" if reply.refusal.fault in set(TransferFault):
                self._fail(TransferFault(reply.refusal.fault), reply.refusal.message)
            case _:  # an empty packet is the end
                self._fail(TransferFault.PEER_LOST, "the receiver ended without an answer")

    def _fail(self, fault: TransferFault, message: str) -> None:
        self._outcome.set_exception(TransferError(fault, message))
        self._tell_end()

    def _tell_end(self) -> None:
        self._has_news.set()
        self._on_end()
