"""Physical blocks: which are free, and how many hold on to each of the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kvcache.errors import ConfigError, InvariantError


class BlockPool:
    """Hands out block ids ``0 .. num_blocks - 1`` and counts references to them.

    Not thread-safe: one event loop owns it. Freed blocks go to the back of the queue, so a block stays
    untouched as long as possible after its last use.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ConfigError(f"A KV cache needs at least one block, not {num_blocks}.")
        self.num_blocks = num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def allocate(self, count: int) -> list[int] | None:
        """Takes ``count`` blocks with one reference each; None, and nothing taken, when there are not enough."""
        if count > len(self._free):
            return None
        block_ids = [self._free.popleft() for _ in range(count)]
        for block_id in block_ids:
            self._references[block_id] = 1
        return block_ids

    def retain(self, block_ids: Iterable[int]) -> None:
        """Adds one reference to each block, all of which must be in use."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                raise InvariantError(f"block {block_id} is free and cannot be retained")
            self._references[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Gives back one reference to each block; the last one frees it."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                raise InvariantError(f"block {block_id} was released more often than it was taken")
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free.append(block_id)

    def free_block_ids(self) -> frozenset[int]:
        """For integrity checks and tests; costs a copy."""
        return frozenset(self._free)
