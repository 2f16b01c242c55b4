"""The tensors behind the blocks."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch

from kvcache.errors import InvariantError, ResourceError
from kvcache.spec import KVCacheSpec
from kvcache.staging import CudaCopyStream, StagedCopies

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ROW_DTYPES: dict[str, torch.dtype] = {**TORCH_DTYPES, "int8": torch.int8, "fp8": torch.uint8}
LARGE_PAGE_BYTES = 2 << 20


class BlockStorage(Protocol):
    """What a handoff needs of a cache: blocks of all KV heads, as bytes in the layout of ``spec``."""

    spec: KVCacheSpec
    num_blocks: int

    def read_blocks(self, layer: int, block_ids: Sequence[int], out: memoryview | None = None) -> memoryview:
        """A copy of the blocks' bytes, in the given order, ``len(block_ids) * spec.layer_block_bytes`` long.

        ``out``: writable memory of that length for the copy, which is returned; new memory by default.
        """
        ...

    def write_blocks(self, layer: int, block_ids: Sequence[int], payload: bytes | memoryview) -> None:
        """Replaces the blocks' content by ``payload``, laid out as ``read_blocks`` gives it."""
        ...


class PagedStorage:
    """KV of all blocks of one worker: one tensor per layer.

    ``layers[l]`` has shape ``[num_blocks, 2, num_kv_heads, block_size, row size]``: keys at index 0 of the
    second dimension, values at 1; ``kvcache.rows`` reads and writes rows. It starts as zeros, so that a masked read
    of a block never written gives 0 and not NaN. This class does not know who owns a block; ``KVCacheManager`` does.
    """

    def __init__(
        self,
        spec: KVCacheSpec,
        num_blocks: int,
        device: str = "cpu",
        memory: torch.Tensor | None = None,
        *,
        with_scratch_block: bool = False,
    ) -> None:
        """
        Args:
            memory: uint8, all zeros, ``bytes_of(spec, num_blocks)`` long; by default allocated here.
            with_scratch_block: adds one block after ``num_blocks`` that no sequence will ever own; not with ``memory``.
        """
        self.spec = spec
        self.num_blocks = num_blocks
        self._has_scratch_block = with_scratch_block
        dtype = ROW_DTYPES[spec.dtype]
        row_size = spec.row_bytes // dtype.itemsize
        shape = (num_blocks + with_scratch_block, 2, spec.num_kv_heads, spec.block_size, row_size)
        if memory is None:
            self.layers = [_zeros(shape, dtype, device) for _ in range(spec.num_layers)]
        else:
            self.layers = [layer.view(dtype).view(shape) for layer in memory.chunk(spec.num_layers)]
        self._device = self.layers[0].device
        self._copies = StagedCopies(CudaCopyStream(self._device)) if self._device.type == "cuda" else None
        # The same memory as bytes, a row per block: copying whole rows through numpy costs a third of torch's way.
        self._rows = [] if self._copies is not None else [_as_rows(layer) for layer in self.layers]

    @property
    def scratch_block(self) -> int:
        """A block to write to what nobody will read."""
        assert self._has_scratch_block, "this storage was made without one"
        return self.num_blocks

    def synchronize(self) -> None:
        """Waits until the device has done what this thread asked of it; on a CPU it always has."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @staticmethod
    def bytes_of(spec: KVCacheSpec, num_blocks: int) -> int:
        return num_blocks * spec.block_bytes

    def read_blocks(self, layer: int, block_ids: Sequence[int], out: memoryview | None = None) -> memoryview:
        """See ``BlockStorage``."""
        if self._copies is not None:
            return self._copies.read(self.layers[layer], block_ids, out)
        rows = self._rows[layer]
        self._check_ids(block_ids)
        num_bytes = len(block_ids) * rows.shape[1]
        copy: np.ndarray = np.empty(num_bytes, np.uint8) if out is None else np.frombuffer(out, np.uint8)
        # Clip: ids were checked, and numpy would otherwise copy twice, to leave ``out`` alone when one is wrong.
        rows.take(block_ids, axis=0, out=copy.reshape(len(block_ids), rows.shape[1]), mode="clip")
        return copy.data

    def write_blocks(self, layer: int, block_ids: Sequence[int], payload: bytes | memoryview) -> None:
        """See ``BlockStorage``."""
        if len(payload) != len(block_ids) * self.spec.layer_block_bytes:
            raise InvariantError(f"{len(payload)} bytes do not fill {len(block_ids)} blocks of one layer")
        if self._copies is not None:
            self._copies.write(self.layers[layer], block_ids, payload)
            return
        self._check_ids(block_ids)
        rows = self._rows[layer]
        rows[list(block_ids)] = np.frombuffer(payload, np.uint8).reshape(len(block_ids), rows.shape[1])

    def _check_ids(self, block_ids: Sequence[int]) -> None:
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise InvariantError(f"blocks {min(block_ids)} to {max(block_ids)} of a cache of {self.num_blocks}")


def _as_rows(layer: torch.Tensor) -> np.ndarray:
    return layer.view(torch.uint8).view(len(layer), -1).numpy()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """On a CPU in large pages where the system gives them: blocks are read in any order, and small pages cost a
    look-up for each."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device != "cpu" or num_bytes < LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        # Zeros; given back with the last tensor over it.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ResourceError(f"There is no memory for {num_bytes >> 20} MiB of KV cache: {error.strerror}.") from error
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
