"""The lowest port of the handoff over RDMA: memory of one process, read from another session of the same process."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import ClassVar

from kvcache.errors import ResourceError

_numbers = itertools.count(1)


class FakeMemory:
    """A ``RemoteMemory``; a test may look at it, or put something before its reads."""

    sessions: ClassVar[dict[str, FakeMemory]] = {}
    before_read: ClassVar[Callable[[], bool]] = lambda: True  # in the thread that reads; False: the read fails

    def __init__(self, host: str = "127.0.0.1", network: str = "tcp") -> None:
        self.session = f"{host}:{next(_numbers)}"
        self.registered: dict[int, int] = {}
        self.room_bytes = 1 << 40
        self.reads = 0
        self.sessions[self.session] = self

    def register(self, address: int, num_bytes: int) -> None:
        if num_bytes > self.room_bytes:
            raise ResourceError("no room")
        assert address not in self.registered
        self.registered[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def read(self, session: str, remote_address: int, address: int, num_bytes: int) -> bool:
        self.reads += 1
        remote = self.sessions.get(session)
        if not type(self).before_read() or remote is None or not remote._has(remote_address, num_bytes):
            return False
        assert self._has(address, num_bytes)
        ctypes.memmove(address, remote_address, num_bytes)
        return True

    def _has(self, address: int, num_bytes: int) -> bool:
        return any(begin <= address and address + num_bytes <= begin + size for begin, size in self.registered.items())
