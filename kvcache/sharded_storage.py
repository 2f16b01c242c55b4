"""The KV cache of a tensor-parallel group, seen as one cache with all heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcache.errors import InvariantError
from kvcache.heads import Shard
from kvcache.spec import KVCacheSpec
from kvcache.storage import BlockStorage


class ShardedStorage:
    """Cuts blocks into the ranks' heads and puts them together again; a ``BlockStorage``.

    ::

        a block of one layer     K: h0 h1 h2 h3   V: h0 h1 h2 h3
        the same on 2 ranks      K: h0 h1 V: h0 h1 │ K: h2 h3 V: h2 h3

    What a head's bytes mean is not looked at. The caller sees to it that no rank computes with a block while it is
    read or written here.
    """

    def __init__(self, spec: KVCacheSpec, shards: Sequence[BlockStorage]) -> None:
        """``shards[rank]`` is the storage of that rank, or how to reach it from here."""
        self.spec = spec
        self.num_blocks = shards[0].num_blocks
        self._shards = tuple(shards)
        self._heads = [Shard(rank, len(shards)).kv_heads(spec.num_kv_heads) for rank in range(len(shards))]
        self._head_bytes = spec.layer_block_bytes // (2 * spec.num_kv_heads)

    def read_blocks(self, layer: int, block_ids: Sequence[int], out: memoryview | None = None) -> memoryview:
        """See ``BlockStorage``. A head that several ranks hold is read from the first of them."""
        shape = self._shape(len(block_ids), self.spec.num_kv_heads)
        blocks = np.empty(shape, np.uint8) if out is None else np.frombuffer(out, np.uint8).reshape(shape)
        num_read = 0
        for shard, heads in zip(self._shards, self._heads, strict=True):
            if heads.stop > num_read:
                payload = np.frombuffer(shard.read_blocks(layer, block_ids), dtype=np.uint8)
                blocks[:, :, heads.start : heads.stop] = payload.reshape(self._shape(len(block_ids), len(heads)))
                num_read = heads.stop
        return memoryview(blocks.reshape(-1).data)

    def write_blocks(self, layer: int, block_ids: Sequence[int], payload: bytes | memoryview) -> None:
        """See ``BlockStorage``. A head that several ranks hold is written to all of them."""
        if len(payload) != len(block_ids) * self.spec.layer_block_bytes:
            raise InvariantError(f"{len(payload)} bytes do not fill {len(block_ids)} blocks of one layer")
        blocks = np.frombuffer(payload, dtype=np.uint8).reshape(self._shape(len(block_ids), self.spec.num_kv_heads))
        for shard, heads in zip(self._shards, self._heads, strict=True):
            shard.write_blocks(layer, block_ids, blocks[:, :, heads.start : heads.stop].tobytes())

    def _shape(self, num_blocks: int, num_heads: int) -> tuple[int, int, int, int]:
        return num_blocks, 2, num_heads, self._head_bytes
