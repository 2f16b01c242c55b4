"""The decode side of a handoff: verifies every chunk, writes it into reserved blocks, says when all is there."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import numpy as np

from kvcache.errors import ConfigError, TransferError, TransferFault
from kvcache.lease import BlockLease, LeaseState
from kvcache.manager import KVCacheManager
from kvcache.spec import KVCacheSpec
from kvcache.storage import BlockStorage
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.convert import make_writer
from kvcache.transfer.wire import Chunk, ChunkRange, Message, chunk_checksum, commit_checksum, spec_from_wire


@dataclass(frozen=True, slots=True)
class ReceivedKV:
    """A verified handoff, ready to be attached."""

    request_id: str
    first_token_id: int
    num_cached_tokens: int  # of the prompt, on the other side
    payload_bytes: int


class IncomingTransfer:
    """One handoff as it arrives. Any port feeds it messages in order.

    Blocks become readable only through the ``ReceivedKV`` that ``commit`` returns. Every method raises
    ``TransferError`` for a message that does not fit; the caller then aborts the lease, and the blocks'
    half-written content is never read. Blocks of the prompt that were here before are outside the lease: they
    cannot be named, let alone written.
    """

    def __init__(self, manager: KVCacheManager, storage: BlockStorage, opening: pb.TransferOpen, now: float) -> None:
        self._manager = manager
        self.lease: BlockLease = manager.leases.find(opening.transfer_id, opening.epoch, now)
        self._source = self._check_spec(opening)
        if self.lease.state is not LeaseState.RESERVED:
            raise TransferError(TransferFault.REPEATED, f"transfer {opening.transfer_id} has been opened before")
        self._first_block, self._end_block = self._sender_blocks(self._source)
        self._written = np.zeros((self._source.num_layers, self._end_block - self._first_block), dtype=bool)
        self._layers_written = np.zeros(self._end_block - self._first_block, dtype=np.int64)  # of each block
        self._num_whole = 0  # blocks before the first that lacks a layer
        self._writer = make_writer(storage, self.lease, self._source)
        self._num_chunks = 0
        self.payload_bytes = 0
        # Last, so that a refused opening changes nothing.
        manager.leases.start_sending(self.lease)
        manager.leases.renew(self.lease, now)

    def write(self, chunk: Chunk, now: float) -> None:
        """Verifies one chunk and writes it into its blocks. Its payload is not needed any more afterwards."""
        leases = self._manager.leases
        self._find_own_lease(chunk.transfer_id, chunk.epoch, now)
        where = chunk.where
        self._check_bounds(where, len(chunk.payload))
        if chunk_checksum(chunk.transfer_id, chunk.epoch, chunk.index, where, chunk.payload) != chunk.checksum:
            raise TransferError(TransferFault.BAD_CHECKSUM, f"{where} of transfer {chunk.transfer_id}")
        if chunk.index != self._num_chunks:
            fault = TransferFault.REPEATED if chunk.index < self._num_chunks else TransferFault.OUT_OF_ORDER
            raise TransferError(fault, f"chunk {chunk.index} where chunk {self._num_chunks} was due")
        start = where.first_block - self._first_block
        span = slice(start, start + where.num_blocks)
        cells = slice(where.layer, where.layer + where.num_layers), span
        if self._written[cells].any():
            raise TransferError(TransferFault.REPEATED, f"{where} of transfer {chunk.transfer_id}")
        self._writer.write(where, chunk.payload)
        self._written[cells] = True
        self._tell_whole(span, where.num_layers)
        self._num_chunks += 1
        self.payload_bytes += len(chunk.payload)
        leases.renew(self.lease, now)

    def _tell_whole(self, written: slice, num_layers: int) -> None:
        """The lease hears how much of the prompt is there in all layers."""
        source = self._source
        self._layers_written[written] += num_layers
        while self._num_whole < len(self._layers_written):
            if self._layers_written[self._num_whole] < source.num_layers:
                break
            self._num_whole += 1
        if self._num_whole:
            end_token = (self._first_block + self._num_whole) * source.block_size
            self.lease.num_verified_tokens = min(end_token, self.lease.num_tokens)

    def distrust(self) -> None:
        """The sender does not keep to the protocol: nothing of it is kept."""
        self.lease.num_verified_tokens = 0

    def commit(self, message: pb.TransferCommit, now: float) -> ReceivedKV:
        """Closes the lease as committed once every block of every layer is there."""
        self._find_own_lease(message.transfer_id, message.epoch, now)
        if not self._written.all() or message.num_chunks != self._num_chunks:
            missing = int((~self._written).sum())
            raise TransferError(
                TransferFault.INCOMPLETE,
                f"transfer {message.transfer_id} lacks {missing} layer blocks,"
                f" has {self._num_chunks} of {message.num_chunks} chunks",
            )
        sealed = commit_checksum(
            message.transfer_id,
            message.epoch,
            message.num_chunks,
            message.first_token_id,
            message.num_cached_tokens,
        )
        if sealed != message.checksum:
            raise TransferError(TransferFault.BAD_CHECKSUM, f"the commit of transfer {message.transfer_id}")
        self._manager.leases.commit(self.lease)
        return ReceivedKV(self.lease.request_id, message.first_token_id, message.num_cached_tokens, self.payload_bytes)

    def _find_own_lease(self, transfer_id: str, epoch: int, now: float) -> None:
        if self._manager.leases.find(transfer_id, epoch, now) is not self.lease:
            raise TransferError(TransferFault.UNKNOWN_TRANSFER, f"transfer {transfer_id} is not this stream's")

    def _check_spec(self, opening: pb.TransferOpen) -> KVCacheSpec:
        """The sender's spec, if its blocks can become ours and are those that are missing here."""
        problem: str | None = None
        try:
            source = spec_from_wire(opening.spec)
            problem = self._manager.spec.obstacle(source)
        except ConfigError as error:
            problem = str(error)
        if problem is None:
            first_block, end_block = self._sender_blocks(source)
            if opening.num_blocks != end_block - first_block:
                problem = f"num_blocks is {end_block - first_block} here and {opening.num_blocks} there"
            elif opening.first_block != first_block:
                problem = f"first_block is {first_block} here and {opening.first_block} there"
        if problem is not None:
            raise TransferError(TransferFault.INCOMPATIBLE, f"transfer {opening.transfer_id}: {problem}")
        return source

    def _sender_blocks(self, source: KVCacheSpec) -> tuple[int, int]:
        """The first of the sender's blocks that holds anything of what is missing here, and the end of them."""
        first_token = self.lease.first_block * self._manager.spec.block_size
        return first_token // source.block_size, source.num_blocks_for(self.lease.num_tokens)

    def _check_bounds(self, where: ChunkRange, payload_bytes: int) -> None:
        source = self._source
        is_inside = (
            self._first_block <= where.first_block
            and where.first_block + where.num_blocks <= self._end_block
            and where.layer + where.num_layers <= source.num_layers
        )
        if where.num_layers < 1 or where.num_blocks < 1 or not is_inside:
            raise TransferError(
                TransferFault.OUT_OF_BOUNDS,
                f"{where}; the transfer has {source.num_layers} layers,"
                f" blocks {self._first_block} to {self._end_block - 1}",
            )
        expected = where.num_layers * where.num_blocks * source.layer_block_bytes
        if payload_bytes != expected:
            raise TransferError(TransferFault.BAD_LENGTH, f"{where} has {payload_bytes} bytes, not {expected}")


class KVReceiver:
    """Takes in handoffs, whichever port they come by. Used on the event loop that owns ``manager``.

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

    async def receive(self, messages: AsyncIterator[Message]) -> pb.TransferReceipt:
        """Receives one handoff. The next message is asked for when the one before is not needed any more.

        Raises:
            TransferError: refused or broken; it has been counted.
        """
        started = self._clock()
        try:
            received = await self._receive(messages)
        except TransferError as error:
            self.failures[error.fault] += 1
            raise
        except asyncio.CancelledError:
            self.failures[TransferFault.PEER_LOST] += 1
            raise
        self.transfers += 1
        self.payload_bytes += received.payload_bytes
        self.receive_seconds += self._clock() - started
        return pb.TransferReceipt(payload_bytes=received.payload_bytes)

    async def _receive(self, messages: AsyncIterator[Message]) -> ReceivedKV:
        incoming: IncomingTransfer | None = None
        try:
            async for message in messages:
                if incoming is None:
                    if not isinstance(message, pb.TransferOpen):
                        raise TransferError(TransferFault.UNKNOWN_TRANSFER, "the stream does not begin with an opening")
                    incoming = IncomingTransfer(self._manager, self._storage, message, self._clock())
                    self._under_way.add(incoming)
                elif isinstance(message, Chunk):
                    incoming.write(message, self._clock())
                elif isinstance(message, pb.TransferCommit):
                    received = incoming.commit(message, self._clock())
                    self._on_received(received)
                    return received
                else:
                    raise TransferError(TransferFault.REPEATED, "a second opening in one stream")
            # A lost connection looks like this too: gRPC may tell of the end before it says that the call is cancelled.
            raise TransferError(TransferFault.PEER_LOST, "the stream ended before its commit")
        except TransferError as error:
            if incoming is not None and not error.fault.is_accident:
                incoming.distrust()
            raise
        finally:
            # Cancelled, refused or cut: whatever was written is never read. No effect after a commit.
            if incoming is not None:
                self._under_way.discard(incoming)
                self._manager.leases.abort(incoming.lease)
