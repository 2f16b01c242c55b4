"""The shape of a KV cache, and every size that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.errors import ConfigError

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What one worker's paged KV cache looks like. Two equal specs can exchange blocks byte for byte.

    One block of one layer is contiguous, keys before values, head by head::

        layer l:  [num_blocks][2: K, V][num_kv_heads][block_size][head_size]
                               └──────────── layer_block_bytes ───────────┘
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
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"KV cache dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r}.")

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return 2 * self.num_kv_heads * self.block_size * self.head_size * DTYPE_BYTES[self.dtype]

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

    def difference(self, other: KVCacheSpec) -> str | None:
        """Names the first field in which two specs differ, or None when blocks can be exchanged as they are."""
        for name in self.__dataclass_fields__:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} is {ours} here and {theirs} there"
        return None
