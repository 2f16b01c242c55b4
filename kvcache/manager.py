"""Which sequence holds which blocks."""

from __future__ import annotations

from collections import Counter

from kvcache.block_pool import BlockPool
from kvcache.errors import InvariantError
from kvcache.lease import LeaseTable
from kvcache.spec import KVCacheSpec


class KVCacheManager:
    """Block tables of all sequences of one worker, over one pool, with the leases of its handoffs.

    A block table lists the physical blocks of a sequence in logical order::

        tokens      0 ……… 15 │ 16 ……… 31 │ 32 … 40
        block table    [7,         2,         9]        block_size 16
    """

    def __init__(self, spec: KVCacheSpec, num_blocks: int, lease_ttl_s: float = 10.0) -> None:
        self.spec = spec
        self.pool = BlockPool(num_blocks)
        self.leases = LeaseTable(self.pool, lease_ttl_s)
        self._tables: dict[str, list[int]] = {}

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def max_tokens(self) -> int:
        """Tokens that one sequence can have when it is alone."""
        return self.num_blocks * self.spec.block_size

    def extend(self, request_id: str, num_tokens: int) -> bool:
        """Makes the sequence's blocks cover ``num_tokens`` tokens; False, and nothing changed, when it cannot now."""
        table = self._tables.get(request_id, [])
        missing = self.spec.num_blocks_for(num_tokens) - len(table)
        if missing > 0:
            block_ids = self.pool.allocate(missing)
            if block_ids is None:
                return False
            self._tables.setdefault(request_id, table).extend(block_ids)
        return True

    def block_table(self, request_id: str) -> list[int]:
        """The sequence's blocks in logical order. Do not change it."""
        return self._tables.get(request_id, [])

    def free(self, request_id: str) -> None:
        """Gives back all blocks of the sequence. A lease on them keeps its own references."""
        self.pool.release(self._tables.pop(request_id, ()))

    def num_unaccounted(self) -> int:
        """Blocks that are neither free nor held by a sequence or a lease. Anything but 0 is a leak."""
        return self.num_blocks - self.num_free - len(self._holders())

    def check_integrity(self) -> None:
        """Compares every reference count with who really holds the block.

        Raises:
            InvariantError: a count is off, a free block is held, or a block is lost.
        """
        holders = self._holders()
        free = self.pool.free_block_ids()
        if len(free) != self.num_free:
            raise InvariantError("a block is in the free queue twice")
        for block_id in range(self.num_blocks):
            references = self.pool.references(block_id)
            if references != holders[block_id]:
                raise InvariantError(f"block {block_id} has {references} references and {holders[block_id]} holders")
            if (references == 0) != (block_id in free):
                raise InvariantError(f"block {block_id} has {references} references; in free queue: {block_id in free}")

    def check_idle(self) -> None:
        """The no-leak check: when nothing is at work, every block is free.

        Raises:
            InvariantError: names who still holds what.
        """
        self.check_integrity()
        if self.num_free != self.num_blocks:
            leases = sorted(lease.transfer_id for lease in self.leases)
            raise InvariantError(
                f"{self.num_blocks - self.num_free} of {self.num_blocks} blocks are not free;"
                f" held by sequences {sorted(self._tables)} and leases {leases}"
            )

    def _holders(self) -> Counter[int]:
        holders: Counter[int] = Counter()
        for table in self._tables.values():
            holders.update(table)
        for lease in self.leases:
            holders.update(lease.block_ids)
        return holders
