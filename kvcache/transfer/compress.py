"""Fewer bytes on a slow link: blocks are read in a narrower dtype than they are kept in.

The receiver is told the dtype in the opening and converts back (``convert.py``), so nothing else knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvcache.errors import InvariantError
from kvcache.rows import decode_rows, encode_rows
from kvcache.storage import ROW_DTYPES, BlockStorage


class RoundedReads:
    """A ``BlockStorage`` to send from: another's blocks, rounded to int8 or fp8 with a scale per token and head."""

    def __init__(self, storage: BlockStorage, dtype: str) -> None:
        """``storage`` keeps numbers that were not rounded so already."""
        if storage.spec.is_scaled:
            raise InvariantError(f"KV in {storage.spec.dtype} is not rounded once more")
        self.spec = replace(storage.spec, dtype=dtype)
        self.num_blocks = storage.num_blocks
        self._storage = storage

    def read_blocks(self, layer: int, block_ids: Sequence[int], out: memoryview | None = None) -> memoryview:
        """See ``BlockStorage``."""
        kept = self._storage.spec
        payload = self._storage.read_blocks(layer, block_ids)
        numbers = torch.frombuffer(payload, dtype=ROW_DTYPES[kept.dtype]).view(-1, kept.head_size)
        rows = encode_rows(decode_rows(numbers, torch.float32), ROW_DTYPES[self.spec.dtype])
        rounded = memoryview(rows.contiguous().view(torch.uint8).numpy().reshape(-1).data)
        if out is None:
            return rounded
        out[:] = rounded
        return out

    def write_blocks(self, layer: int, block_ids: Sequence[int], payload: bytes | memoryview) -> None:
        raise InvariantError("these blocks are for sending only")
