"""The handoff over gRPC: the default port, for workers anywhere. Messages pass as bytes; see ``wire.py``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NoReturn

import grpc

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.port import Outlet
from kvcache.transfer.receiver import KVReceiver
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.wire import (
    FAULT_METADATA_KEY,
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Message,
    decode_message,
    encode_message,
)

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # What a stream may send ahead of its reader. Left to itself gRPC takes all of a handoff that nobody reads.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", MAX_CHUNK_BYTES),
)
MESSAGES_HELD = 3  # of a transfer: one that is framed, and one on its way, of which gRPC makes a copy
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
        self._payload = bytearray()  # of the chunk that is being framed, of whichever transfer

    async def open(self, transfer: OutgoingTransfer, on_end: Callable[[], None]) -> Outlet:
        """Returns at once: whether anybody is there is seen later.

        Not a registered method, as a stub's is: to register one on a closed channel ends the process.
        """
        channel = self._channel_to(transfer.target.address)
        send: grpc.aio.StreamUnaryMultiCallable[bytes, pb.TransferReceipt] = channel.stream_unary(
            f"/{SERVICE}/Send", request_serializer=None, response_deserializer=pb.TransferReceipt.FromString
        )
        slot_bytes = transfer.slot_bytes(MESSAGES_HELD)
        if len(self._payload) < slot_bytes:
            self._payload = bytearray(slot_bytes)
        try:
            return _GrpcOutlet(send(), memoryview(self._payload)[:slot_bytes], on_end)
        except grpc.aio.UsageError:
            raise TransferError(TransferFault.PEER_LOST, "the connection is closed") from None


class _GrpcOutlet:
    """A message is framed as soon as it is put, so all outlets share the memory for a chunk's payload."""

    def __init__(
        self, call: grpc.aio.StreamUnaryCall[Any, pb.TransferReceipt], slot: memoryview, on_end: Callable[[], None]
    ) -> None:
        self._call = call
        self._slot = slot
        self._writing: asyncio.Future[None] | None = None
        call.add_done_callback(lambda _: on_end())

    @property
    def has_ended(self) -> bool:
        return self._call.done()

    async def slot(self) -> memoryview:
        return self._slot

    async def put(self, message: Message) -> None:
        """Returns when the connection has taken the message before this one, which waits for a slow receiver.

        So one chunk is gathered and framed while another is on its way.
        """
        data = encode_message(message)
        await self._written()
        self._writing = asyncio.ensure_future(self._call.write(data))

    async def _written(self) -> None:
        if self._writing is not None:
            with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # ended already: the receipt tells why
                await self._writing

    async def receipt(self) -> int:
        await self._written()
        try:
            if not self._call.done():
                await self._call.done_writing()
            return (await self._call).payload_bytes
        except grpc.aio.AioRpcError as error:
            raise transfer_error_from(error) from None

    def close(self) -> None:
        self._call.cancel()
        if self._writing is not None:
            self._writing.cancel()
