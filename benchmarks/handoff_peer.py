"""The other process of ``benchmarks.handoff``: ``python -m benchmarks.handoff_peer KIND``.

It prints where it listens, answers one line of JSON to each line that it reads, and ends with its standard input.

KIND is ``tcp``, ``grpc-sync`` or ``grpc-async``, which count bytes and throw them away, or ``cache``: the receiving
half of a decode worker, with a real cache and without a model.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import orjson
import torch

from benchmarks.handoff_memory import buffer_bytes
from kvcache.manager import KVCacheManager
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.allocator import keep_message_buffers
from kvcache.transfer.grpc_port import KVTransferService
from kvcache.transfer.receiver import KVReceiver, ReceivedKV
from kvcache.transfer.shm_service import ShmService
from kvcache.transfer.wire import Chunk, Message
from workers.channels import SERVER_OPTIONS

HOST = "127.0.0.1"
BARE_METHOD = "/benchmarks.Bare/Send"
RECEIVE_BYTES = 1 << 20


def make_cache(spec: KVCacheSpec, num_blocks: int) -> tuple[KVCacheManager, PagedStorage]:
    """All of its memory has been written, so that none is fetched from the system while it is measured."""
    storage = PagedStorage(spec, num_blocks)
    for layer in storage.layers:
        layer.copy_(torch.randn(layer.shape[1:]).expand_as(layer))
    return KVCacheManager(spec, num_blocks, lease_ttl_s=120.0, prefix_caching=False), storage


class HeldReceiver(KVReceiver):
    """The receiver that serves; while ``opened`` is clear it takes one chunk of each handoff and no more."""

    opened: asyncio.Event

    async def receive(self, messages: AsyncIterator[Message]) -> pb.TransferReceipt:
        return await super().receive(self._held(messages))

    async def _held(self, messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
        async for message in messages:
            yield message
            if isinstance(message, Chunk):
                await self.opened.wait()


class Cache:
    """Reserves blocks when it is told to and gives them back when they have been filled."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int) -> None:
        self.manager, storage = make_cache(spec, num_blocks)
        self.receiver = HeldReceiver(self.manager, storage, time.monotonic, self._received, Counter())
        self.receiver.opened = asyncio.Event()
        self.receiver.opened.set()

    def _received(self, received: ReceivedKV) -> None:
        self.manager.free(received.request_id)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "reserve" in request:
            for transfer_id in request["reserve"]:
                self.manager.extend(transfer_id, request["num_tokens"])
                table = self.manager.block_table(transfer_id)
                tokens = request["num_tokens"]
                self.manager.leases.open(transfer_id, transfer_id, table, time.monotonic(), num_tokens=tokens)
        if "hold" in request:
            (self.receiver.opened.clear if request["hold"] else self.receiver.opened.set)()
        return {
            "bytes_under_way": self.receiver.bytes_under_way,
            "buffer_bytes": buffer_bytes(),
        }


async def serve_cache(spec: KVCacheSpec, num_blocks: int) -> None:
    torch.set_num_threads(1)
    cache = Cache(spec, num_blocks)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    KVTransferService(cache.receiver).add_to(server)
    address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    await server.start()
    shm = ShmService(cache.receiver)
    shm.start(address)
    print(address, flush=True)
    async for line in _lines():
        print(orjson.dumps(cache.answer(orjson.loads(line))).decode(), flush=True)
    await shm.stop()
    await server.stop(None)


async def _lines() -> AsyncIterator[bytes]:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line


def _count(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    return sum(map(len, messages)).to_bytes(8, "little")


async def _count_async(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    total = 0
    async for message in messages:
        total += len(message)
    return total.to_bytes(8, "little")


def _bare_handler(behaviour: Callable[..., bytes] | Callable[..., Awaitable[bytes]]) -> grpc.GenericRpcHandler:
    _, service, method = BARE_METHOD.split("/")
    handler: Any = grpc.stream_unary_rpc_method_handler(behaviour)
    return grpc.method_handlers_generic_handler(service, {method: handler})


def serve_bare_grpc() -> None:
    server = grpc.server(ThreadPoolExecutor(4), options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((_bare_handler(_count),))
    address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    server.start()
    print(address, flush=True)
    sys.stdin.read()
    server.stop(None)


async def serve_bare_grpc_async() -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((_bare_handler(_count_async),))
    address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
    await server.start()
    print(address, flush=True)
    async for _ in _lines():
        pass
    await server.stop(None)


def serve_tcp() -> None:
    """Answers each connection's bytes with their number, when its end was read."""
    listener = socket.create_server((HOST, 0))
    print(f"{HOST}:{listener.getsockname()[1]}", flush=True)
    threading.Thread(target=_take_connections, args=(listener,), daemon=True).start()
    sys.stdin.read()


def _take_connections(listener: socket.socket) -> None:
    buffer = bytearray(RECEIVE_BYTES)
    while True:
        connection, _ = listener.accept()
        with connection:
            total = 0
            while received := connection.recv_into(buffer):
                total += received
            connection.sendall(total.to_bytes(8, "little"))


def main(words: list[str]) -> None:
    keep_message_buffers()  # as a worker does
    match words:
        case ["tcp"]:
            serve_tcp()
        case ["grpc-sync"]:
            serve_bare_grpc()
        case ["grpc-async"]:
            asyncio.run(serve_bare_grpc_async())
        case ["cache", layers, heads, head_size, block_size, dtype, num_blocks]:
            spec = KVCacheSpec(int(layers), int(heads), int(head_size), int(block_size), dtype)
            asyncio.run(serve_cache(spec, int(num_blocks)))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
