"""Buffers that are registered with an RDMA library, which takes too long to be done for every handoff.

::

    new ──► in use ──► free ──► in use …        registered all the time, up to KEPT_BYTES of free ones
               │         └────► resting         not registered, its pages given back; may be used again
               └──────────────► lost            the same, and never used again

The library's own threads may still look at a buffer that was given back (somebody reads it, late), and write to one
whose read it gave up. So the addresses of a buffer stay its own until the process ends; what is given back are pages.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections import defaultdict
from dataclasses import dataclass

from kvcache.transfer.remote_memory import RemoteMemory

KEPT_BYTES = 32 << 20
MIN_BUFFER_BYTES = 64 << 10
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    address: int
    view: memoryview
    memory: mmap.mmap

    @classmethod
    def create(cls, num_bytes: int) -> Buffer:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return cls(ctypes.addressof(ctypes.c_char.from_buffer(memory)), memoryview(memory), memory)


class RegisteredMemory:
    """Owned by one event loop."""

    def __init__(self, remote: RemoteMemory) -> None:
        self.remote = remote
        self._free: dict[int, list[Buffer]] = defaultdict(list)  # by size
        self._resting: dict[int, list[Buffer]] = defaultdict(list)
        self._all: list[Buffer] = []  # Python would unmap one that nobody knows
        self.free_bytes = 0
        self.num_lost = 0

    def take(self, num_bytes: int) -> Buffer:
        """A registered buffer of at least so many bytes, which may hold anything.

        Raises:
            ResourceError: the library cannot register more.
        """
        size = max(MIN_BUFFER_BYTES, 1 << (num_bytes - 1).bit_length())
        if self._free[size]:
            self.free_bytes -= size
            return self._free[size].pop()
        resting = self._resting[size]
        if not resting:
            resting.append(Buffer.create(size))
            self._all.append(resting[-1])
        self.remote.register(resting[-1].address, size)
        return resting.pop()

    def give_back(self, buffer: Buffer) -> None:
        """Nobody writes to it any more."""
        size = len(buffer.view)
        if self.free_bytes + size > KEPT_BYTES:
            self._unregister(buffer)
            self._resting[size].append(buffer)
        else:
            self.free_bytes += size
            self._free[size].append(buffer)

    def give_up(self, buffer: Buffer) -> None:
        """Somebody may write to it at any time to come."""
        self._unregister(buffer)
        self.num_lost += 1
        logger.warning("A read of another worker's KV failed; %d buffers are not used again.", self.num_lost)

    def _unregister(self, buffer: Buffer) -> None:
        self.remote.unregister(buffer.address)
        buffer.memory.madvise(mmap.MADV_DONTNEED)
