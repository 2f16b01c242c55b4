"""How fast bytes can go from one process of this machine to another: what a handoff is compared with."""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import orjson

from benchmarks.handoff_peer import BARE_METHOD
from kvcache.errors import ResourceError
from workers.channels import SERVER_OPTIONS

MESSAGE_BYTES = (256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20)
STREAM_BYTES = 192 << 20  # about the KV of 4,096 tokens of the default model


@dataclass(frozen=True, slots=True)
class Peer:
    """A process of ``benchmarks.handoff_peer``."""

    address: str
    process: subprocess.Popen[str]

    def ask(self, **request: object) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(orjson.dumps(request).decode() + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = orjson.loads(self.process.stdout.readline())
        return answer


@contextmanager
def running_peer(*words: str, module: str = "benchmarks.handoff_peer") -> Iterator[Peer]:
    """Ends the process in the end.

    Raises:
        ResourceError: it does not start.
    """
    command = [sys.executable, "-m", module, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise ResourceError(f"The process {' '.join(words)} did not start.")
        try:
            yield Peer(address, process)
        finally:
            process.stdin.close()
            process.wait(30)


def memcpy_gb_s() -> float:
    """One thread copies an array that no cache holds."""
    source, target = np.ones(STREAM_BYTES, np.uint8), np.ones(STREAM_BYTES, np.uint8)
    started_s = time.perf_counter()
    np.copyto(target, source)
    return _gb_s(STREAM_BYTES, started_s)


def tcp_gb_s(peer: Peer, message_bytes: int = 1 << 20) -> float:
    host, port = peer.address.split(":")
    message = bytes(message_bytes)
    with socket.create_connection((host, int(port))) as connection:
        started_s = time.perf_counter()
        for _ in range(STREAM_BYTES // message_bytes):
            connection.sendall(message)
        connection.shutdown(socket.SHUT_WR)
        total = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
        assert total == STREAM_BYTES
        return _gb_s(total, started_s)


def bare_grpc_gb_s(peer: Peer, message_bytes: int) -> float:
    """Raw bytes, no protobuf; the blocking API on both sides."""
    message = bytes(message_bytes)
    with grpc.insecure_channel(peer.address, options=SERVER_OPTIONS) as channel:
        send: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(BARE_METHOD)
        send(iter([message]))  # connects
        started_s = time.perf_counter()
        total = int.from_bytes(send(itertools.repeat(message, STREAM_BYTES // message_bytes)), "little")
        assert total == STREAM_BYTES
        return _gb_s(total, started_s)


async def bare_grpc_async_gb_s(peer: Peer, message_bytes: int) -> float:
    """The same through asyncio."""
    message = bytes(message_bytes)
    async with grpc.aio.insecure_channel(peer.address, options=SERVER_OPTIONS) as channel:
        await channel.channel_ready()
        send: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(BARE_METHOD)
        call = send()
        started_s = time.perf_counter()
        for _ in range(STREAM_BYTES // message_bytes):
            await call.write(message)
        await call.done_writing()
        total = int.from_bytes(await call, "little")
        assert total == STREAM_BYTES
        return _gb_s(total, started_s)


def best_async_rate(peer: Peer, message_bytes: int) -> float:
    return asyncio.run(bare_grpc_async_gb_s(peer, message_bytes))


def _gb_s(num_bytes: int, started_s: float) -> float:
    return num_bytes / (time.perf_counter() - started_s) / 1e9
