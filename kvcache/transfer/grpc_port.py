"""The handoff over gRPC: the default port, for workers anywhere."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import NoReturn

import grpc

from kvcache.errors import TransferError, TransferFault
from kvcache.manager import KVCacheManager
from kvcache.storage import BlockStorage
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer import kv_transfer_pb2_grpc as pb_grpc
from kvcache.transfer.receiver import IncomingTransfer, ReceivedKV
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.wire import FAULT_METADATA_KEY, MAX_MESSAGE_BYTES

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)


class KVTransferService(pb_grpc.KVTransferServicer):
    """Receives handoffs. Runs on the event loop that owns ``manager``.

    ``on_received`` is called once per handoff, after the last check and before the sender is told; what it
    raises refuses the commit.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        storage: BlockStorage,
        clock: Callable[[], float],
        on_received: Callable[[ReceivedKV], None],
        failures: Counter[TransferFault],
    ) -> None:
        self._manager = manager
        self._storage = storage
        self._clock = clock
        self._on_received = on_received
        self.transfers = 0
        self.payload_bytes = 0
        self.receive_seconds = 0.0
        self._under_way: set[IncomingTransfer] = set()
        self.failures = failures

    @property
    def bytes_under_way(self) -> int:
        """Payload that has been verified and not been committed yet."""
        return sum(incoming.payload_bytes for incoming in self._under_way)

    async def Send(  # the name is gRPC's
        self,
        request_iterator: AsyncIterator[pb.TransferMessage],
        context: grpc.aio.ServicerContext[pb.TransferMessage, pb.TransferReceipt],
    ) -> pb.TransferReceipt:
        started = self._clock()
        try:
            received = await self._receive(request_iterator)
        except TransferError as error:
            self.failures[error.fault] += 1
            await refuse(context, error)
        except asyncio.CancelledError:
            self.failures[TransferFault.PEER_LOST] += 1
            raise
        self.transfers += 1
        self.payload_bytes += received.payload_bytes
        self.receive_seconds += self._clock() - started
        return pb.TransferReceipt(payload_bytes=received.payload_bytes)

    async def _receive(self, messages: AsyncIterator[pb.TransferMessage]) -> ReceivedKV:
        incoming: IncomingTransfer | None = None
        try:
            async for message in messages:
                kind = message.WhichOneof("message")
                if incoming is None:
                    if kind != "open":
                        raise TransferError(TransferFault.UNKNOWN_TRANSFER, "the stream does not begin with an opening")
                    incoming = IncomingTransfer(self._manager, self._storage, message.open, self._clock())
                    self._under_way.add(incoming)
                elif kind == "chunk":
                    incoming.write(message.chunk, self._clock())
                elif kind == "commit":
                    received = incoming.commit(message.commit, self._clock())
                    self._on_received(received)
                    return received
                else:
                    raise TransferError(TransferFault.REPEATED, "a second opening, or an empty message, in one stream")
            raise TransferError(TransferFault.INCOMPLETE, "the stream ended before its commit")
        except TransferError as error:
            if incoming is not None and not error.fault.is_accident:
                incoming.distrust()
            raise
        finally:
            # Cancelled, refused or cut: whatever was written is never read. No effect after a commit.
            if incoming is not None:
                self._under_way.discard(incoming)
                self._manager.leases.abort(incoming.lease)


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


async def send_kv(receiver: pb_grpc.KVTransferStub, transfer: OutgoingTransfer, stall_timeout_s: float) -> int:
    """Sends a transfer's messages as they come and waits until the other side has verified and attached them.

    The caller owns the source lease and may free the blocks when this returns. Waits as long as the computing
    takes; gives up when the other side takes nothing for ``stall_timeout_s``. Returns the payload bytes.

    Raises:
        TransferError: refused, broken, or the lease ended; the other side will not use what it got.
    """
    sent_bytes = 0
    try:
        call = receiver.Send()
    except grpc.aio.UsageError:
        raise TransferError(TransferFault.PEER_LOST, "the connection is closed") from None
    call.add_done_callback(lambda _: transfer.changed.set())  # an early end is noticed while nothing is ready
    try:
        while not transfer.is_finished and not call.done():
            message = transfer.next_message()
            if message is None:
                await transfer.changed.wait()
                transfer.changed.clear()
                continue
            try:
                await asyncio.wait_for(call.write(message), stall_timeout_s)
            except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
                break  # the other side has ended the call already; awaiting it below tells why
            sent_bytes += len(message.chunk.payload)
        else:
            if not call.done():
                await call.done_writing()
        receipt = await asyncio.wait_for(call, stall_timeout_s)
    except grpc.aio.AioRpcError as error:
        raise transfer_error_from(error) from None
    except TimeoutError:
        raise TransferError(
            TransferFault.EXPIRED,
            f"the receiver took nothing of transfer {transfer.target.transfer_id} for {stall_timeout_s:g} s",
        ) from None
    finally:
        call.cancel()
    if receipt.payload_bytes != sent_bytes:
        raise TransferError(TransferFault.INCOMPLETE, f"sent {sent_bytes} bytes, {receipt.payload_bytes} acknowledged")
    return sent_bytes
