"""The handoff over gRPC: the default port, for workers anywhere. Messages pass as bytes; see ``wire.py``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import grpc

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.allocator import bytes_to_fill
from kvcache.transfer.port import STALL_S, Outlet, Patience
from kvcache.transfer.receiver import KVReceiver
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.turns import Turns
from kvcache.transfer.wire import (
    FAULT_METADATA_KEY,
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Chunk,
    Message,
    decode_message,
    encode_before_payload,
    encode_message,
)

MESSAGES_HELD = 2  # of a transfer: one that is made and sent, and gRPC's copy of it
HELD_BESIDE_BYTES = 64 << 10  # by gRPC with each of them: what it has read ahead
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # What a stream may send ahead of its reader. Left to itself gRPC takes all of a handoff that nobody reads.
    # A whole message: with less the rest of it only leaves when the reader has asked for it, and waits.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", MAX_CHUNK_BYTES - HELD_BESIDE_BYTES + (1 << 12)),
    # A message comes in a few long pieces, not in frames of 16 KiB: each piece is copied twice more in Python.
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.experimental.tcp_min_read_chunk_size", 128 << 10),
    ("grpc.experimental.tcp_read_chunk_size", 512 << 10),
    ("grpc.experimental.tcp_max_read_chunk_size", 1 << 20),
)
MESSAGES_TOGETHER = 4  # to one receiver: more would only be fresh memory, which costs page faults
SERVICE = "twinpool.kv.KVTransfer"


class KVTransferService:
    """``KVTransfer`` of the .proto, over ``receiver``."""

    def __init__(self, receiver: KVReceiver) -> None:
        self._receiver = receiver

    def add_to(self, server: grpc.aio.Server) -> None:
        """Not by the stubs, which would have protobuf copy every payload."""
        send: grpc.RpcMethodHandler[bytes, pb.TransferReceipt] = grpc.stream_unary_rpc_method_handler(
            self._send, request_deserializer=None, response_serializer=pb.TransferReceipt.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Send": send}),))

    async def _send(
        self, request_iterator: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, pb.TransferReceipt]
    ) -> pb.TransferReceipt:
        try:
            return await self._receiver.receive(_decoded(request_iterator))
        except TransferError as error:
            await refuse(context, error)


async def _decoded(messages: AsyncIterator[bytes]) -> AsyncIterator[Message]:
    async for data in messages:
        yield decode_message(data)


async def refuse(context: grpc.aio.ServicerContext, error: TransferError) -> NoReturn:
    """Ends an RPC with the fault's code where the other side can read it."""
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message, ((FAULT_METADATA_KEY, error.fault.value),))
    raise AssertionError("abort always raises")


def transfer_error_from(error: grpc.aio.AioRpcError) -> TransferError:
    """The other side's refusal as it was raised there; anything else means that it was lost."""
    for key, value in error.trailing_metadata() or ():
        if key == FAULT_METADATA_KEY and value in set(TransferFault):
            return TransferError(TransferFault(value), error.details() or "")
    return TransferError(TransferFault.PEER_LOST, f"{error.code().name}: {error.details()}")


class GrpcPort:
    """A ``KVPort`` to every address."""

    def __init__(self, channel_to: Callable[[str], grpc.aio.Channel]) -> None:
        self._channel_to = channel_to
        self._turns: WeakValueDictionary[str, Turns] = WeakValueDictionary()  # by address

    async def open(self, transfer: OutgoingTransfer, on_end: Callable[[], None]) -> Outlet:
        """Returns at once: whether anybody is there is seen later.

        Not a registered method, as a stub's is: to register one on a closed channel ends the process.
        """
        channel = self._channel_to(transfer.target.address)
        send: grpc.aio.StreamUnaryMultiCallable[bytes, pb.TransferReceipt] = channel.stream_unary(
            f"/{SERVICE}/Send", request_serializer=None, response_deserializer=pb.TransferReceipt.FromString
        )
        turns = self._turns.setdefault(transfer.target.address, Turns(MESSAGES_TOGETHER))
        try:
            return _GrpcOutlet(send(), transfer, turns, on_end)
        except grpc.aio.UsageError:
            raise TransferError(TransferFault.PEER_LOST, "the connection is closed") from None


class _GrpcOutlet:
    """A chunk's payload is gathered where its message wants it: behind as many bytes as the last one had before it. If
    that turns out wrong the message is put together anew."""

    def __init__(
        self,
        call: grpc.aio.StreamUnaryCall[Any, pb.TransferReceipt],
        transfer: OutgoingTransfer,
        turns: Turns,
        on_end: Callable[[], None],
    ) -> None:
        """``turns``: of all outlets to one receiver."""
        self._call = call
        self._turns = turns
        self._turn: int | None = None  # of the next chunk
        self._is_asking = False
        self._has_news = asyncio.Event()
        self._transfer = transfer
        self._room_bytes = transfer.slot_bytes(MESSAGES_HELD, HELD_BESIDE_BYTES)
        self._num_before = 0
        self._message, self._room = b"", memoryview(b"")  # of the next chunk
        self._on_end = on_end
        call.add_done_callback(lambda _: self._end())

    def _end(self) -> None:
        self._has_news.set()
        self._on_end()

    @property
    def has_ended(self) -> bool:
        return self._call.done()

    async def slot(self, patience: Patience) -> memoryview:
        if self._turn is None:
            self._is_asking = True
            self._turns.ask(self._take_turn)
        while self._turn is None and not self.has_ended:
            patience.suspend()
            self._has_news.clear()
            await self._has_news.wait()
            patience.renew()
        payload_bytes = self._transfer.next_payload_bytes(self._room_bytes)
        self._message, self._room = bytes_to_fill(self._num_before + (payload_bytes or self._room_bytes))
        return self._room[self._num_before :]

    def _take_turn(self, turn: int) -> None:
        self._turn = turn
        self._is_asking = False
        self._has_news.set()

    async def put(self, message: Message) -> None:
        """Returns when the connection has taken the message, which waits for a slow receiver.

        The next chunk is gathered while this one leaves the connection's buffers; to gather it sooner costs a task for
        each message and room for one more, so that messages would have to be shorter.
        """
        data = self._chunk_message(message) if isinstance(message, Chunk) else encode_message(message)
        self._message, self._room = b"", memoryview(b"")
        stalled = asyncio.get_running_loop().call_later(STALL_S, self._give_turn_back)
        try:
            with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # ended already: the receipt tells why
                await self._call.write(data)
        finally:
            stalled.cancel()
        self._give_turn_back()

    def _chunk_message(self, chunk: Chunk) -> bytes:
        before = encode_before_payload(chunk)
        if len(before) == self._num_before and len(before) + len(chunk.payload) == len(self._message):
            self._room[: len(before)] = before
            return self._message
        self._num_before = len(before)
        return before + chunk.payload

    def _give_turn_back(self) -> None:
        if self._turn is not None:
            self._turns.give_back(self._turn)
            self._turn = None

    async def receipt(self) -> int:
        try:
            if not self._call.done():
                await self._call.done_writing()
            return (await self._call).payload_bytes
        except grpc.aio.AioRpcError as error:
            raise transfer_error_from(error) from None

    def close(self) -> None:
        self._call.cancel()
        if self._is_asking:
            self._turns.forget(self._take_turn)
        self._give_turn_back()
