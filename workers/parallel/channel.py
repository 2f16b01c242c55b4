"""Frames between a leader and a follower: a local stream socket, bytes with their length in front."""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence

from workers.parallel.rank import RankLostError

_LENGTH = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_WATCH_MS = 500
_NUM_DESCRIPTORS = 2


class Channel:
    """One end of a connection. One thread at a time may use it, beside a ``LossWatch``."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_timeout(self, timeout_s: float | None) -> None:
        """How long ``receive`` waits for bytes; None is for ever."""
        self._socket.settimeout(timeout_s)

    def send(self, payload: bytes | memoryview, descriptors: Sequence[int] = ()) -> None:
        """Sends one frame, and copies of file descriptors with it.

        Raises:
            RankLostError: the other end is gone.
        """
        try:
            header = _LENGTH.pack(len(payload))
            if descriptors:
                socket.send_fds(self._socket, [header], descriptors)
            else:
                self._socket.sendall(header)
            self._socket.sendall(payload)
        except OSError as error:
            raise RankLostError(f"a rank cannot be reached: {error}") from error

    def receive(self) -> bytearray:
        """The next frame.

        Raises:
            RankLostError: the other end is gone, or silent for longer than the timeout.
        """
        (length,) = _LENGTH.unpack(self._receive(_LENGTH.size))
        return self._receive(length)

    def receive_with_descriptors(self) -> tuple[bytearray, tuple[int, ...]]:
        """The next frame and the file descriptors that came with it, which are the caller's to close."""
        try:
            header, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH.size, _NUM_DESCRIPTORS)
        except OSError as error:
            raise RankLostError(f"a rank cannot be reached: {error}") from error
        header += self._receive(_LENGTH.size - len(header))
        return self._receive(*_LENGTH.unpack(header)), tuple(descriptors)

    def close(self) -> None:
        self._socket.close()

    def _receive(self, length: int) -> bytearray:
        payload = bytearray(length)
        view = memoryview(payload)
        while view:
            try:
                received = self._socket.recv_into(view)
            except OSError as error:
                raise RankLostError(f"a rank cannot be reached: {error}") from error
            if not received:
                raise RankLostError("the process of a rank has ended")
            view = view[received:]
        return payload


class Listener:
    """Where followers find their leader: a socket without a file, for processes of the same user."""

    def __init__(self) -> None:
        self.address = f"twinpool-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.address}")
        self._socket.listen()

    def accept(self, timeout_s: float) -> Channel | None:
        """The next connection of this user, or None when none came within the time."""
        self._socket.settimeout(timeout_s)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] != os.geteuid():  # the name is visible to everybody on the machine
            connection.close()
            return None
        connection.settimeout(None)
        return Channel(connection)

    def close(self) -> None:
        self._socket.close()


def connect(address: str) -> Channel:
    """Connects to a ``Listener``.

    Raises:
        RankLostError: nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(f"\0{address}")
    except OSError as error:
        connection.close()
        raise RankLostError(f"the leader cannot be reached: {error}") from error
    return Channel(connection)


class LossWatch:
    """Calls ``on_lost`` once, from a thread of its own, when another end is closed before ``stop`` is called."""

    def __init__(self, channels: Sequence[Channel], on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._stopped = threading.Event()
        self._poller = select.poll()
        for channel in channels:
            self._poller.register(channel.fileno(), select.POLLRDHUP)
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when ``on_lost`` runs no more. Call before the channels are closed."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            if self._poller.poll(_WATCH_MS) and not self._stopped.is_set():
                self._on_lost()
                return
