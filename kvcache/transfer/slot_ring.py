"""Memory that a sender and a receiver on one host share: a few slots, each for one chunk."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.wire import MAX_BLOCK_BYTES

MAX_SLOTS = 16


def check_ring(num_slots: int, slot_bytes: int) -> None:
    """Of a ring that another process has.

    Raises:
        TransferError: it has another shape than there may be.
    """
    if not (0 < slot_bytes <= MAX_BLOCK_BYTES and 0 < num_slots <= MAX_SLOTS):
        raise TransferError(TransferFault.OUT_OF_BOUNDS, f"{num_slots} slots of {slot_bytes} bytes")


def check_inside(told: pb.ShmChunk, num_slots: int, slot_bytes: int) -> None:
    """
    Raises:
        TransferError: the chunk lies outside of a ring of this shape.
    """
    if told.slot >= num_slots or told.payload_bytes > slot_bytes:
        raise TransferError(
            TransferFault.OUT_OF_BOUNDS, f"{told.payload_bytes} bytes in slot {told.slot} of {num_slots}"
        )


@dataclass(frozen=True, slots=True)
class SlotRing:
    slots: tuple[memoryview, ...]
    _memory: mmap.mmap

    @classmethod
    def create(cls, slot_bytes: int, num_slots: int) -> tuple[SlotRing, int]:
        """New memory, and its file descriptor, which the caller closes. The memory has no name: the last process
        that has it mapped takes it along, whichever way it ends.

        Raises:
            OSError: there is no memory.
        """
        descriptor = os.memfd_create("twinpool-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, num_slots * slot_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            memory = mmap.mmap(descriptor, num_slots * slot_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(_cut(memory, slot_bytes, num_slots), memory), descriptor

    @classmethod
    def open(cls, descriptor: int, slot_bytes: int, num_slots: int) -> SlotRing:
        """Maps another process's memory, for reading.

        Raises:
            TransferError: it is not what it is said to be. Without the seals, for one, its owner could shrink it and
                so kill whoever reads it.
        """
        check_ring(num_slots, slot_bytes)
        problem = _problem(descriptor, slot_bytes * num_slots)
        if problem is not None:
            raise TransferError(TransferFault.INCOMPATIBLE, f"the shared memory {problem}")
        memory = mmap.mmap(descriptor, num_slots * slot_bytes, prot=mmap.PROT_READ)
        return cls(_cut(memory, slot_bytes, num_slots), memory)

    def close(self) -> None:
        """Gives the memory back; if a payload in it is still looked at, with the last look."""
        with suppress(BufferError):
            for slot in self.slots:
                slot.release()
            self._memory.close()


class MappedRings:
    """Other processes' rings, each mapped once, however many transfers come through it."""

    def __init__(self) -> None:
        self._open: dict[_Identity, _Mapped] = {}

    @contextmanager
    def open(self, descriptor: int, slot_bytes: int, num_slots: int) -> Iterator[SlotRing]:
        """See ``SlotRing.open``; the last to leave gives the memory back. The caller may close the descriptor inside.

        Raises:
            TransferError: as ``SlotRing.open`` does.
        """
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino, slot_bytes, num_slots)  # no other memory's while this one is mapped
        mapped = self._open.get(identity)
        if mapped is None:
            mapped = self._open[identity] = _Mapped(SlotRing.open(descriptor, slot_bytes, num_slots))
        mapped.num_users += 1
        try:
            yield mapped.ring
        finally:
            mapped.num_users -= 1
            if mapped.num_users == 0:
                del self._open[identity]
                mapped.ring.close()


_Identity = tuple[int, int, int, int]


@dataclass(slots=True)
class _Mapped:
    ring: SlotRing
    num_users: int = 0


def _cut(memory: mmap.mmap, slot_bytes: int, num_slots: int) -> tuple[memoryview, ...]:
    with memoryview(memory) as whole:
        return tuple(whole[slot * slot_bytes : (slot + 1) * slot_bytes] for slot in range(num_slots))


def _problem(descriptor: int, num_bytes: int) -> str | None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        return "is not this user's"
    if status.st_size != num_bytes:
        return f"has {status.st_size} bytes, not {num_bytes}"
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # of a file system that has none
        seals = 0
    needed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    return None if seals & needed == needed else "is not sealed against a change of its size"
