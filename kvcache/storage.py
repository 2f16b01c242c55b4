"""The tensors behind the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from kvcache.errors import InvariantError
from kvcache.spec import KVCacheSpec

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class BlockStorage(Protocol):
    """What a handoff needs of a cache: blocks of all KV heads, as bytes in the layout of ``spec``."""

    spec: KVCacheSpec

    def read_blocks(self, layer: int, block_ids: Sequence[int]) -> memoryview:
        """A copy of the blocks' bytes, in the given order, ``len(block_ids) * spec.layer_block_bytes`` long."""
        ...

    def write_blocks(self, layer: int, block_ids: Sequence[int], payload: bytes | memoryview) -> None:
        """Replaces the blocks' content by ``payload``, laid out as ``read_blocks`` gives it."""
        ...


class PagedStorage:
    """KV of all blocks of one worker: one tensor per layer.

    ``layers[l]`` has shape ``[num_blocks, 2, num_kv_heads, block_size, head_size]``: keys at index 0 of the
    second dimension, values at 1. It starts as zeros, so that a masked read of a block never written
    gives 0 and not NaN. This class does not know who owns a block; ``KVCacheManager`` does.
    """

    def __init__(
        self, spec: KVCacheSpec, num_blocks: int, device: str = "cpu", memory: torch.Tensor | None = None
    ) -> None:
        """``memory``: uint8, all zeros, ``bytes_of(spec, num_blocks)`` long; by default allocated here."""
        self.spec = spec
        self.num_blocks = num_blocks
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_size)
        dtype = TORCH_DTYPES[spec.dtype]
        if memory is None:
            self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]
        else:
            self.layers = [layer.view(dtype).view(shape) for layer in memory.chunk(spec.num_layers)]

    @staticmethod
    def bytes_of(spec: KVCacheSpec, num_blocks: int) -> int:
        return num_blocks * spec.block_bytes

    def read_blocks(self, layer: int, block_ids: Sequence[int]) -> memoryview:
        """See ``BlockStorage``."""
        index = torch.tensor(block_ids, dtype=torch.long, device=self.layers[layer].device)
        blocks = self.layers[layer].index_select(0, index).cpu()
        return memoryview(blocks.view(torch.uint8).numpy().data).cast("B")

    def write_blocks(self, layer: int, block_ids: Sequence[int], payload: bytes | memoryview) -> None:
        """See ``BlockStorage``."""
        if len(payload) != len(block_ids) * self.spec.layer_block_bytes:
            raise InvariantError(f"{len(payload)} bytes do not fill {len(block_ids)} blocks of one layer")
        target = self.layers[layer]
        # frombuffer refuses read-only memory with a warning; one copy of at most a chunk is the price.
        source = torch.frombuffer(bytearray(payload), dtype=target.dtype).view(len(block_ids), *target.shape[1:])
        index = torch.tensor(block_ids, dtype=torch.long, device=target.device)
        target.index_copy_(0, index, source.to(target.device))
