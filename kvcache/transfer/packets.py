"""A Unix socket of packets on an event loop."""

from __future__ import annotations

import asyncio
import os
import socket
import time

MAX_PACKET_BYTES = 4096  # no message through shared memory is nearly as long
POLL_S = 100e-6  # about the time that a chunk takes


class Wakefulness:
    """Keeps an event loop from sleeping for ``POLL_S`` after each packet, for the next one mostly comes sooner than a
    sleeping process wakes up. Whatever else there is to do is done meanwhile."""

    def __init__(self) -> None:
        self._until_s = 0.0
        self._is_awake = False

    def extend(self) -> None:
        """A packet has come or gone."""
        self._until_s = time.perf_counter() + POLL_S
        if not self._is_awake:
            self._is_awake = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_awake = time.perf_counter() < self._until_s
        if self._is_awake:
            os.sched_yield()  # to the other side, where there is no core for it
            loop.call_soon(self._turn, loop)


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

    async def receive(self) -> bytes:
        """The next packet; empty: the end."""
        while True:
            try:
                return self._connection.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                await self.wait()
            except OSError:
                return b""
