"""The handoff through shared memory, to a worker of the same user on the same host: the sender's side.

::

    sender                                                            receiver
      │ ── connects to the Unix socket named after its address ────────► │   each looks at the other's user id
      │ ── ShmRing + file descriptor of the slots  ────────────────────► │   maps them for reading
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
from contextlib import suppress

from google.protobuf.message import DecodeError

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.packets import MAX_PACKET_BYTES, POLL_S
from kvcache.transfer.port import STALL_S, Outlet, Patience
from kvcache.transfer.port_choice import HAS_SHM
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.slot_pool import SLOTS_PER_TRANSFER, SlotPool
from kvcache.transfer.wire import MAX_CHUNK_BYTES, Chunk, Message, chunk_header

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
        self._pools: dict[tuple[str, int], SlotPool] = {}  # by address and slot bytes

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
        key = transfer.target.address, max(MAX_CHUNK_BYTES, transfer.block_bytes)
        try:
            pool = self._join_pool(key)
        except OSError:  # no memory, no descriptors
            peer.close()
            return None
        shape = pb.ShmRing(num_slots=len(pool.slots), slot_bytes=len(pool.slots[0]))
        try:
            socket.send_fds(peer, [pb.ShmMessage(ring=shape).SerializeToString()], [pool.descriptor])
        except OSError:  # the other side has ended
            peer.close()
            self._leave_pool(key)
            return None
        return _ShmOutlet(peer, pool, on_end, lambda: self._leave_pool(key))

    def _join_pool(self, key: tuple[str, int]) -> SlotPool:
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = SlotPool(slot_bytes=key[1])
        pool.join()
        return pool

    def _leave_pool(self, key: tuple[str, int]) -> None:
        if self._pools[key].leave():
            del self._pools[key]


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
    def __init__(
        self, peer: socket.socket, pool: SlotPool, on_end: Callable[[], None], on_gone: Callable[[], None]
    ) -> None:
        """``on_gone`` is called when the receiver looks into no slot of this transfer any more, after ``close``."""
        self._peer = peer
        self._pool = pool
        self._on_end = on_end
        self._on_gone = on_gone
        self._slot: int | None = None  # to be filled
        self._sent: set[int] = set()  # slots that the receiver has not given back
        self._num_taken = 0  # slots that it has given back
        self._watch: asyncio.TimerHandle | None = None  # over the slots that it has
        self._is_asking = False
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[int] = self._loop.create_future()
        self._has_news = asyncio.Event()
        self._loop.add_reader(peer, self._read)

    @property
    def has_ended(self) -> bool:
        return self._outcome.done()

    async def slot(self, patience: Patience) -> memoryview:
        if self._pool.has_others:
            await asyncio.sleep(0)  # their turn
        self._ask()
        self._poll()
        while self._slot is None and not self.has_ended:
            if self._is_asking:
                patience.suspend()
            self._has_news.clear()
            await self._has_news.wait()
            patience.renew()
            self._ask()
        return self._pool.slots[self._slot or 0]

    def _ask(self) -> None:
        if self._slot is None and not self._is_asking and len(self._sent) < SLOTS_PER_TRANSFER:
            self._is_asking = True
            self._pool.turns.ask(self._take_slot)

    def _take_slot(self, slot: int) -> None:
        self._slot = slot
        self._is_asking = False
        self._has_news.set()

    def _poll(self) -> None:
        """Looks for a free slot before ``slot`` sleeps, unless another transfer has something to do meanwhile."""
        deadline_s = time.perf_counter() + (0.0 if self._pool.has_others else POLL_S)
        while self._slot is None and not self.has_ended and time.perf_counter() < deadline_s:
            os.sched_yield()  # to the receiver, where there is no core for it
            self._read()
            self._ask()

    async def put(self, message: Message) -> None:
        """A chunk's payload lies in the slot that ``slot`` gave last; other messages leave it to other transfers."""
        if self.has_ended:
            return
        if isinstance(message, Chunk):
            assert self._slot is not None, "a chunk is put into a slot"
            told = pb.ShmChunk(chunk=chunk_header(message), slot=self._slot, payload_bytes=len(message.payload))
            packet = pb.ShmMessage(chunk=told)
            self._sent.add(self._slot)
            self._slot = None
            self._watch_slots()
        elif isinstance(message, pb.TransferOpen):
            packet = pb.ShmMessage(open=message)
        else:
            packet = pb.ShmMessage(commit=message)
        self._give_slot_back()
        try:
            await self._loop.sock_sendall(self._peer, packet.SerializeToString())
        except OSError:
            self._read()  # the other side has ended: it may have said why

    def _watch_slots(self) -> None:
        """One timer for a tenth of a second, not one for each chunk: that costs as much as to frame it."""
        if self._watch is None and self._sent:
            self._watch = self._loop.call_later(STALL_S, self._replace_slots, self._num_taken)

    def _replace_slots(self, num_taken: int) -> None:
        self._watch = None
        for slot in self._sent if num_taken == self._num_taken else ():
            self._pool.turns.get_stuck(slot)
        self._watch_slots()

    def _give_slot_back(self) -> None:
        """The one that was not filled."""
        if self._slot is not None:
            self._pool.turns.give_back(self._slot)
            self._slot = None

    async def receipt(self) -> int:
        return await self._outcome

    def close(self) -> None:
        """A receiver that is in the middle of a chunk goes on reading it: its slots come back when it has ended."""
        if not self._outcome.done():
            self._outcome.cancel()
        elif not self._outcome.cancelled():
            self._outcome.exception()  # somebody has looked
        if self._is_asking:
            self._pool.turns.forget(self._take_slot)
        self._give_slot_back()
        if not self._sent:
            self._leave()
            return
        with suppress(OSError):  # it has ended
            self._peer.shutdown(socket.SHUT_WR)
        self._loop.remove_reader(self._peer)
        self._loop.add_reader(self._peer, self._await_end)
        self._await_end()

    def _await_end(self) -> None:
        try:
            while self._peer.recv(MAX_PACKET_BYTES):
                pass
        except BlockingIOError:
            return
        except OSError:  # it left some of ours unread: the end too
            pass
        self._leave()

    def _leave(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        for slot in self._sent:
            self._pool.turns.give_back(slot)
        self._loop.remove_reader(self._peer)
        self._peer.close()
        self._on_gone()

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
            case "taken" if reply.taken.slot in self._sent:
                self._sent.discard(reply.taken.slot)
                self._num_taken += 1
                self._pool.turns.give_back(reply.taken.slot)
                self._has_news.set()
            case "receipt":
                self._outcome.set_result(reply.receipt.payload_bytes)
                self._tell_end()
            case "refusal" if reply.refusal.fault in set(TransferFault):
                self._fail(TransferFault(reply.refusal.fault), reply.refusal.message)
            case None if not packet:
                self._fail(TransferFault.PEER_LOST, "the receiver ended without an answer")
            case _:
                self._fail(TransferFault.MALFORMED, "the receiver's answer is none to what was sent")

    def _fail(self, fault: TransferFault, message: str) -> None:
        self._outcome.set_exception(TransferError(fault, message))
        self._tell_end()

    def _tell_end(self) -> None:
        self._has_news.set()
        self._on_end()
