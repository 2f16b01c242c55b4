"""How attention heads are shared out over the ranks of a tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcache.errors import ConfigError
from kvcache.spec import KVCacheSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a model that ``size`` ranks compute together. ``Shard()`` is all of it."""

    rank: int = 0
    size: int = 1

    def of(self, total: int) -> range:
        """This rank's part of ``total`` equal things in a row; sizes differ by at most one."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def kv_heads(self, num_kv_heads: int) -> range:
        """This rank's KV heads. With more ranks than heads, neighbouring ranks hold the same one.

        ::

            4 heads, 2 ranks   0 1 │ 2 3          2 heads, 4 ranks   0 │ 0 │ 1 │ 1
        """
        first = self.rank * num_kv_heads // self.size
        return range(first, max(first + 1, (self.rank + 1) * num_kv_heads // self.size))

    def of_spec(self, spec: KVCacheSpec) -> KVCacheSpec:
        """The cache that this rank keeps of a cache with all heads."""
        return replace(spec, num_kv_heads=len(self.kv_heads(spec.num_kv_heads)))


def possible_sizes(num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """Numbers of ranks among which these heads can be shared out, smallest first."""
    return tuple(
        size
        for size in range(1, num_heads + 1)
        if num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    )


def check_size(option: str, size: int, num_heads: int, num_kv_heads: int) -> None:
    """Every rank must get the same number of attention heads, and the KV heads that these read.

    Raises:
        ConfigError: names ``option``, the numbers, and what would do.
    """
    possible = possible_sizes(num_heads, num_kv_heads)
    if size not in possible:
        raise ConfigError(
            f"{option} is {size}: {num_heads} attention heads and {num_kv_heads} KV heads can be shared out among"
            f" {', '.join(map(str, possible))} ranks."
        )
