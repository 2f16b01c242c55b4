"""The shape of a KV cache, and every size that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.errors import ConfigError

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# Rounded with a scale for every token and head: int8 symmetric, fp8 as e4m3 without infinities.
SCALED_DTYPE_BYTES: dict[str, int] = {"int8": 1, "fp8": 1}
SCALE_BYTES = 4  # a float32
CACHE_DTYPES = (*DTYPE_BYTES, *SCALED_DTYPE_BYTES)


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What one worker's paged KV cache looks like. Two equal specs can exchange blocks byte for byte.

    One block of one layer is contiguous, keys before values, head by head; a row is one token in one head::

        layer l:  [num_blocks][2: K, V][num_kv_heads][block_size][row]
                               └───────── layer_block_bytes ─────────┘
        row:      head_size numbers of float32, bfloat16 or float16
                  head_size bytes of int8 or fp8, then their scale as a float32

    A scale is written with its token and never again, so that a block fills token by token without loss, and it
    travels inside the block.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_size", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"KV cache {name} must be at least 1, not {getattr(self, name)}.")
        if self.dtype not in CACHE_DTYPES:
            raise ConfigError(f"KV cache dtype must be one of {', '.join(CACHE_DTYPES)}, not {self.dtype!r}.")

    @property
    def is_scaled(self) -> bool:
        """Whether every row carries a scale."""
        return self.dtype in SCALED_DTYPE_BYTES

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one head of one layer, keys or values."""
        if self.is_scaled:
            return self.head_size * SCALED_DTYPE_BYTES[self.dtype] + SCALE_BYTES
        return self.head_size * DTYPE_BYTES[self.dtype]

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return 2 * self.num_kv_heads * self.block_size * self.row_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.layer_block_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.block_bytes // self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def handoff_bytes(self, num_tokens: int) -> int:
        """KV payload bytes that a handoff of a ``num_tokens`` prompt moves, without headers."""
        return self.num_blocks_for(num_tokens) * self.block_bytes

    def obstacle(self, other: KVCacheSpec) -> str | None:
        """Names the first field that keeps KV from being exchanged; None when it can be, converted if need be.

        Block sizes and dtypes may differ: ``kvcache.transfer.convert`` repacks.
        """
        for name in ("num_layers", "num_kv_heads", "head_size"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} is {ours} here and {theirs} there"
        return None
