"""Physical blocks: which are free, how many hold on to each of the others, and which hold KV that is worth keeping."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvcache.errors import ConfigError, InvariantError
from kvcache.prefix import PrefixIndex


class BlockPool:
    """Hands out block ids ``0 .. num_blocks - 1`` and counts references to them.

    Not thread-safe: one event loop owns it. Freed blocks go to the back of the queue, so a block stays
    untouched as long as possible after its last use. Until then it stays in ``prefixes``, if it was there,
    and ``share`` brings it back: the queue is the prefix cache, least recently used first.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ConfigError(f"A KV cache needs at least one block, not {num_blocks}.")
        self.num_blocks = num_blocks
        self.prefixes = PrefixIndex()
        # Hears the names and ids of cached blocks whose content is about to be lost; it may still read them.
        self.on_evict: Callable[[Sequence[bytes], Sequence[int]], None] | None = None
        self._free = OrderedDict.fromkeys(range(num_blocks))  # a queue that gives up any of its members at once
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Cached blocks that nobody holds are free."""
        return len(self._free)

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def allocate(self, count: int) -> list[int] | None:
        """Takes ``count`` blocks with one reference each; None, and nothing taken, when there are not enough.

        What they held is forgotten: they are the caller's to write.
        """
        if count > len(self._free):
            return None
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        if self.on_evict is not None:
            evicted = [block_id for block_id in block_ids if block_id in self.prefixes]
            if evicted:
                self.on_evict([self.prefixes.name_of(block_id) for block_id in evicted], evicted)
        for block_id in block_ids:
            self.prefixes.forget(block_id)
            self._references[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds one reference to each of these indexed blocks, for reading. A free one leaves the queue."""
        for block_id in block_ids:
            if block_id not in self.prefixes:
                raise InvariantError(f"block {block_id} is not in the prefix index and cannot be shared")
            self._free.pop(block_id, None)
            self._references[block_id] += 1

    def retain(self, block_ids: Iterable[int]) -> None:
        """Adds one reference to each block, all of which must be in use."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                raise InvariantError(f"block {block_id} is free and cannot be retained")
            self._references[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Gives back one reference to each block; the last one frees it.

        In the order in which they may be used again: the tail of a sequence before its head, for without the
        head the tail is of no use to anybody.
        """
        for block_id in block_ids:
            if self._references[block_id] == 0:
                raise InvariantError(f"block {block_id} was released more often than it was taken")
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None

    def free_block_ids(self) -> frozenset[int]:
        """For integrity checks and tests; costs a copy."""
        return frozenset(self._free)
