"""The prefill side of a handoff: the blocks of one sequence leave while later ones are still being computed."""

from __future__ import annotations

import asyncio
import operator
from dataclasses import dataclass

from kvcache.errors import TransferError, TransferFault
from kvcache.lease import BlockLease
from kvcache.storage import BlockStorage
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.wire import (
    MAX_CHUNK_BYTES,
    Chunk,
    ChunkRange,
    Message,
    make_chunk,
    make_commit,
    spec_to_wire,
)


@dataclass(frozen=True, slots=True)
class TransferTarget:
    """Where a handoff goes. Made by the decode worker that reserved the blocks."""

    address: str  # host:port of its KVTransfer service
    transfer_id: str
    epoch: int
    num_held_tokens: int = 0  # the other side holds the KV of the prompt before it


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What the commit says beside that all was sent."""

    first_token_id: int
    num_cached_tokens: int = 0  # of the prompt: not computed for this sequence


class OutgoingTransfer:
    """One sequence's blocks on their way. Any port takes messages from it, in order.

    Whoever computes says how far each layer is; a block may leave once all its tokens of that layer are there::

                  block  0 1 2 3 4
        layer 0          s s s r r      s  sent
        layer 1          s s r r r      r  ready: computed, not sent yet
        layer 2          s s · · ·      ·  still being computed

    Blocks have their logical numbers, and those before the lease's ``first_block`` are not sent.
    Used on one event loop. The port awaits ``changed`` when there is nothing to take.
    """

    def __init__(
        self, storage: BlockStorage, lease: BlockLease, target: TransferTarget, max_chunk_bytes: int = MAX_CHUNK_BYTES
    ) -> None:
        spec = storage.spec
        self.target = target
        self.changed = asyncio.Event()
        self._storage = storage
        self.lease = lease
        self.block_bytes = spec.layer_block_bytes  # of one block in one layer: no payload is shorter
        self._max_chunk_bytes = max_chunk_bytes
        self._blocks_per_chunk = max(1, max_chunk_bytes // self.block_bytes)
        self._num_layer_blocks = spec.num_layers * len(lease.block_ids)
        self.max_payload_bytes = min(self._blocks_per_chunk, self._num_layer_blocks) * self.block_bytes
        self._end_block = lease.first_block + len(lease.block_ids)
        self._ready = [lease.first_block] * spec.num_layers  # up to which block
        self._sent = [lease.first_block] * spec.num_layers
        self._num_chunks = 0
        self._outcome: PrefillOutcome | None = None
        self._is_opened = False
        self.is_finished = False  # the commit was taken

    def slot_bytes(self, num_slots: int, beside_bytes: int = 0) -> int:
        """Whole blocks, one at least: ``num_slots`` of them, each with ``beside_bytes``, are no longer than two chunks
        of ``max_chunk_bytes``, and none is longer than what this transfer has."""
        num_blocks = (2 * self._max_chunk_bytes // num_slots - beside_bytes) // self.block_bytes
        return max(1, min(num_blocks, self._blocks_per_chunk, self._num_layer_blocks)) * self.block_bytes

    def next_payload_bytes(self, room_bytes: int) -> int:
        """Of the chunk that ``next_message`` would make now with room for one block at least; 0: that is no chunk."""
        where = self._next_range(self._blocks_in(room_bytes)) if self._is_opened else None
        return 0 if where is None else where.num_layers * where.num_blocks * self.block_bytes

    def mark_ready(self, num_layers: int, num_blocks: int) -> None:
        """The prompt's first ``num_blocks`` blocks are complete in the first ``num_layers`` layers."""
        for layer in range(num_layers):
            self._ready[layer] = max(self._ready[layer], num_blocks)
        self.changed.set()

    @property
    def num_bytes_left(self) -> int:
        """Payload that no port has taken yet."""
        return sum(self._end_block - sent for sent in self._sent) * self._storage.spec.layer_block_bytes

    def complete(self, outcome: PrefillOutcome) -> None:
        """Everything is computed; the commit may follow the last block."""
        self._outcome = outcome
        self.mark_ready(len(self._ready), self._end_block)

    @property
    def has_message(self) -> bool:
        """``next_message`` would return one, or raise."""
        return (
            not self.lease.is_open
            or not self._is_opened
            or (self._outcome is not None and not self.is_finished)
            or any(map(operator.gt, self._ready, self._sent))
        )

    def next_message(self, slot: memoryview | None = None) -> Message | None:
        """The opening, a chunk of at most ``max_chunk_bytes`` (one block at least), or the commit; None: not now.

        A chunk is copied out of the cache here, so no more than the one that the port holds is in memory.

        Args:
            slot: where a chunk's payload is put, which is not longer then; room for one block at least. By default
                into new memory.

        Raises:
            TransferError: the lease on the source blocks ended meanwhile, so they may not be read any more.
        """
        if not self.lease.is_open:
            raise TransferError(
                TransferFault.ABORTED, f"the source lease of transfer {self.target.transfer_id} has ended"
            )
        if not self._is_opened:
            self._is_opened = True
            return self._opening()
        where = self._next_range(self._blocks_per_chunk if slot is None else self._blocks_in(len(slot)))
        if where is not None:
            return self._chunk(where, slot)
        if self._outcome is None or self.is_finished:
            return None
        self.is_finished = True
        return self._commit(self._outcome)

    def _blocks_in(self, room_bytes: int) -> int:
        return min(self._blocks_per_chunk, room_bytes // self.block_bytes)

    def _next_range(self, max_blocks: int) -> ChunkRange | None:
        """Of the layer that is least far of those with something ready, the lowest of equals; if that leaves room,
        of the layers after it that are just as far.

        So the prompt's first blocks are whole first on the other side, and stay there if this breaks.
        """
        layers = [layer for layer, ready in enumerate(self._ready) if ready > self._sent[layer]]
        if not layers:
            return None
        layer = min(layers, key=self._sent.__getitem__)
        sent, ready = self._sent[layer], self._ready[layer]
        num_blocks = min(max_blocks, ready - sent)
        end_layer = layer + 1
        last_layer = min(len(self._ready), layer + max_blocks // num_blocks)
        while end_layer < last_layer and self._sent[end_layer] == sent and self._ready[end_layer] == ready:
            end_layer += 1
        return ChunkRange(layer, sent, num_blocks, end_layer - layer)

    def _opening(self) -> pb.TransferOpen:
        return pb.TransferOpen(
            transfer_id=self.target.transfer_id,
            epoch=self.target.epoch,
            spec=spec_to_wire(self._storage.spec),
            num_blocks=len(self.lease.block_ids),
            first_block=self.lease.first_block,
        )

    def _commit(self, outcome: PrefillOutcome) -> pb.TransferCommit:
        return make_commit(
            self.target.transfer_id,
            self.target.epoch,
            self._num_chunks,
            outcome.first_token_id,
            outcome.num_cached_tokens,
        )

    def _chunk(self, where: ChunkRange, slot: memoryview | None) -> Chunk:
        start = where.first_block - self.lease.first_block
        block_ids = self.lease.block_ids[start : start + where.num_blocks]
        layer_bytes = where.num_blocks * self.block_bytes
        if slot is None:
            slot = memoryview(bytearray(where.num_layers * layer_bytes))
        for index in range(where.num_layers):
            layer = where.layer + index
            self._storage.read_blocks(layer, block_ids, slot[index * layer_bytes : (index + 1) * layer_bytes])
            self._sent[layer] += where.num_blocks
        index = self._num_chunks
        self._num_chunks += 1
        payload = slot[: where.num_layers * layer_bytes]
        return make_chunk(self.target.transfer_id, self.target.epoch, index, where, payload)
