"""A sender's blocks become a receiver's: another block size, another dtype, or both, in one repack.

Every worker's spec names all KV heads of the model, however many ranks share them (``ShardedStorage`` cuts and joins
them), so ranks need no conversion here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from kvcache.lease import BlockLease
from kvcache.rows import decode_rows, encode_rows
from kvcache.spec import KVCacheSpec
from kvcache.storage import ROW_DTYPES, BlockStorage
from kvcache.transfer.wire import ChunkRange


class BlockWriter(Protocol):
    """Puts what a sender's blocks hold into the blocks of a lease."""

    def write(self, where: ChunkRange, payload: bytes | memoryview) -> None:
        """``where`` counts the sender's blocks; ``payload`` is in its layout and has been verified."""
        ...


def _by_layer(where: ChunkRange, payload: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """Each layer and what the payload has of it."""
    data = memoryview(payload)
    num_bytes = len(data) // where.num_layers
    for index in range(where.num_layers):
        yield where.layer + index, data[index * num_bytes : (index + 1) * num_bytes]


def make_writer(storage: BlockStorage, lease: BlockLease, source: KVCacheSpec) -> BlockWriter:
    """``source`` may differ from the storage's spec in block size and dtype, see ``KVCacheSpec.obstacle``."""
    if source == storage.spec:
        return _AsTheyAre(storage, lease)
    return _Repacked(storage, lease, source)


class _AsTheyAre:
    def __init__(self, storage: BlockStorage, lease: BlockLease) -> None:
        self._storage = storage
        self._lease = lease

    def write(self, where: ChunkRange, payload: bytes | memoryview) -> None:
        start = where.first_block - self._lease.first_block
        block_ids = self._lease.block_ids[start : start + where.num_blocks]
        for layer, blocks in _by_layer(where, payload):
            self._storage.write_blocks(layer, block_ids, blocks)


class _Repacked:
    """Takes chunks apart into rows (one token in one head) and puts them together in other blocks.

    ::

        sender, blocks of 4      │ 0 1 2 3 │ 4 5 6 7 │ 8 9 . . │        tokens; a prompt of 10
        receiver, blocks of 8    │ 0 1 2 3 4 5 6 7 │ 8 9 . . . . . . │

    Tokens that the receiver held before, and what lies beyond the prompt, are left out. The rest of a block is zeros:
    nothing of an earlier owner stays in it.
    """

    def __init__(self, storage: BlockStorage, lease: BlockLease, source: KVCacheSpec) -> None:
        self._storage = storage
        self._lease = lease
        self._source = source
        self._first_token = lease.first_block * storage.spec.block_size
        self._begun = np.zeros((source.num_layers, len(lease.block_ids)), dtype=bool)  # blocks that hold something

    def write(self, where: ChunkRange, payload: bytes | memoryview) -> None:
        for layer, blocks in _by_layer(where, payload):
            self._write_layer(layer, where, blocks)

    def _write_layer(self, layer: int, where: ChunkRange, payload: memoryview) -> None:
        source = self._source
        first_token = where.first_block * source.block_size
        shape = (where.num_blocks, 2, source.num_kv_heads, source.block_size, source.row_bytes)
        rows = _by_token(np.frombuffer(payload, dtype=np.uint8).reshape(shape))
        start = max(first_token, self._first_token)
        end = min(first_token + rows.shape[2], self._lease.num_tokens)
        self._put(layer, start, self._converted(rows[:, :, start - first_token : end - first_token]))

    def _converted(self, rows: np.ndarray) -> np.ndarray:
        """``[2, heads, tokens, row bytes]`` of the sender as those of the receiver."""
        source, target = self._source.dtype, self._storage.spec.dtype
        if source == target:
            return rows
        numbers = decode_rows(torch.from_numpy(np.ascontiguousarray(rows)).view(ROW_DTYPES[source]), torch.float32)
        return encode_rows(numbers, ROW_DTYPES[target]).contiguous().view(torch.uint8).numpy()

    def _put(self, layer: int, first_token: int, rows: np.ndarray) -> None:
        """Writes tokens into the blocks that they fall into, beside what these hold already."""
        spec = self._storage.spec
        first_block = first_token // spec.block_size
        num_blocks = spec.num_blocks_for(first_token + rows.shape[2]) - first_block
        held = slice(first_block - self._lease.first_block, first_block - self._lease.first_block + num_blocks)
        block_ids = self._lease.block_ids[held]
        blocks = np.zeros((num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.row_bytes), dtype=np.uint8)
        for index in np.flatnonzero(self._begun[layer, held]):
            present = self._storage.read_blocks(layer, [block_ids[index]])
            blocks[index] = np.frombuffer(present, dtype=np.uint8).reshape(blocks.shape[1:])
        tokens = _by_token(blocks)
        offset = first_token - first_block * spec.block_size
        tokens[:, :, offset : offset + rows.shape[2]] = rows
        merged = tokens.reshape(2, spec.num_kv_heads, num_blocks, spec.block_size, spec.row_bytes)
        self._storage.write_blocks(layer, block_ids, merged.transpose(2, 0, 1, 3, 4).tobytes())
        self._begun[layer, held] = True


def _by_token(blocks: np.ndarray) -> np.ndarray:
    """``[blocks, 2, heads, block size, row bytes]`` as ``[2, heads, tokens, row bytes]``, a copy."""
    _, parts, num_heads, _, row_bytes = blocks.shape
    return blocks.transpose(1, 2, 0, 3, 4).reshape(parts, num_heads, -1, row_bytes)
