"""A Unix socket of packets on an event loop."""

from __future__ import annotations

import asyncio
import os
import socket
import time

MAX_PACKET_BYTES = 4096  # no message through shared memory is nearly as long
POLL_S = 100e-6  # about the time that a chunk takes


class PacketReader:
    """Reads a non-blocking socket. Looks at it from the beginning to ``close``: asyncio's own ``sock_recv`` would tell
    the kernel anew for every packet."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._has_news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._has_news.set)

    def close(self) -> None:
        """The socket stays open."""
        self._loop.remove_reader(self._connection)

    async def wait(self) -> None:
        """Returns when something may be there, which is not read."""
        self._has_news.clear()
        await self._has_news.wait()

    async def receive(self, poll_s: float = 0.0) -> bytes:
        """The next packet; empty: the end. Looks for ``poll_s`` before it sleeps, and holds up the loop meanwhile."""
        deadline_s = time.perf_counter() + poll_s
        while True:
            try:
                return self._connection.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                if time.perf_counter() >= deadline_s:
                    await self.wait()
                else:
                    os.sched_yield()
            except OSError:
                return b""
