"""Which sequence holds which blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import chain

from kvcache.block_pool import BlockPool
from kvcache.errors import InvariantError
from kvcache.lease import LeaseTable
from kvcache.spec import KVCacheSpec


class KVCacheManager:
    """Block tables of all sequences of one worker, over one pool, with the leases of its handoffs.

    A block table lists the physical blocks of a sequence in logical order::

        tokens      0 ……… 15 │ 16 ……… 31 │ 32 … 40
        block table    [7,         2,         9]        block_size 16

    Full blocks whose KV is whole may be shared by sequences and stay cached after them; with
    ``prefix_caching`` off, none ever is. A block that is shared or cached is written by nobody.
    """

    def __init__(
        self, spec: KVCacheSpec, num_blocks: int, lease_ttl_s: float = 10.0, *, prefix_caching: bool = True
    ) -> None:
        self.spec = spec
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_blocks)
        self.leases = LeaseTable(self.pool, lease_ttl_s)
        self._tables: dict[str, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; those that are cached are among them."""
        return self.pool.num_free

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def max_tokens(self) -> int:
        """Tokens that one sequence can have when it is alone."""
        return self.num_blocks * self.spec.block_size

    def find_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """The cached blocks of the longest prefix with these block hashes. They are the caller's only by ``begin``."""
        return self.pool.prefixes.longest_prefix(hashes)

    def num_blocks_to_begin(self, num_tokens: int, prefix: Sequence[int]) -> int:
        """Free blocks that ``begin`` would use up: new ones, and cached ones that nobody holds now."""
        unheld = sum(self.pool.references(block_id) == 0 for block_id in prefix)
        return self.spec.num_blocks_for(num_tokens) - len(prefix) + unheld

    def begin(self, request_id: str, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        """Gives a sequence without blocks those of ``prefix``, shared, and new ones up to ``num_tokens`` tokens.

        False, and nothing changed, when it cannot now.
        """
        if request_id in self._tables:
            raise InvariantError(f"sequence {request_id} has blocks already")
        if self.num_blocks_to_begin(num_tokens, prefix) > self.num_free:
            return False
        self.pool.share(prefix)  # first: so that none of them is taken for a new block
        self._tables[request_id] = list(prefix)
        return self.extend(request_id, num_tokens)

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

    def num_blocks_held_by(self, request_ids: Iterable[str], besides: Collection[int] = ()) -> int:
        """Blocks that only these sequences hold, but for those in ``besides``: freed when all of them are."""
        held = Counter(chain.from_iterable(self.block_table(request_id) for request_id in request_ids))
        kept = frozenset(besides)
        return sum(self.pool.references(block) == count and block not in kept for block, count in held.items())

    def cache(self, request_id: str, hashes: Sequence[bytes], first_block: int = 0) -> None:
        """Others may read the sequence's blocks from ``first_block`` on from now on: one for each of ``hashes``.

        Call it only when their KV is whole: after the step that computed it, or after the commit that verified it.
        """
        if self.prefix_caching:
            block_ids = self.block_table(request_id)[first_block : first_block + len(hashes)]
            for block_hash, block_id in zip(hashes, block_ids, strict=True):
                self.pool.prefixes.add(block_hash, block_id)

    def distrust(self, request_id: str) -> None:
        """Nobody else gets the sequence's blocks: something is wrong with it, and it may be in its KV."""
        for block_id in self.block_table(request_id):
            self.pool.prefixes.forget(block_id)

    def check_writable(self, request_id: str, first_block: int, end_block: int) -> None:
        """The last guard of everybody's KV, before a step or a transfer writes to these blocks of the sequence.

        A lease of the sequence itself may be on them: a prompt is sent while it is computed.

        Raises:
            InvariantError: another sequence reads one of them too, or may come to.
        """
        own_leases: Counter[int] | None = None  # most blocks have one reference: nobody needs to look
        for block_id in self.block_table(request_id)[first_block:end_block]:
            references = self.pool.references(block_id)
            if references > 1:
                if own_leases is None:
                    own = (lease.block_ids for lease in self.leases if lease.request_id == request_id)
                    own_leases = Counter(chain.from_iterable(own))
                references -= own_leases[block_id]
            if references != 1 or block_id in self.pool.prefixes:
                raise InvariantError(f"block {block_id} of {request_id} is shared or cached and may not be written")

    def free(self, request_id: str) -> None:
        """Gives back all blocks of the sequence. A lease on them keeps its own references."""
        self.pool.release(reversed(self._tables.pop(request_id, [])))

    def num_unaccounted(self) -> int:
        """Blocks that are neither free nor held by a sequence or a lease. Anything but 0 is a leak."""
        return self.num_blocks - self.num_free - len(self._holders())

    def check_integrity(self) -> None:
        """Compares every reference count with who really holds the block, and the prefix index with itself.

        Raises:
            InvariantError: a count is off, a free block is held, a block is lost, or hashes and blocks of the index
                do not name each other.
        """
        holders = self._holders()
        free = self.pool.free_block_ids()
        self._check_index()
        for block_id in range(self.num_blocks):
            references = self.pool.references(block_id)
            if references != holders[block_id]:
                raise InvariantError(f"block {block_id} has {references} references and {holders[block_id]} holders")
            if (references == 0) != (block_id in free):
                raise InvariantError(f"block {block_id} has {references} references; in free queue: {block_id in free}")

    def check_idle(self) -> None:
        """The no-leak check: when nothing is at work, every block is free, cached or not.

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

    def _check_index(self) -> None:
        index = self.pool.prefixes
        index.check_integrity()
        if not all(0 <= block_id < self.num_blocks for block_id in index):
            raise InvariantError("the prefix index names a block that does not exist")
        if len(index) and not self.prefix_caching:
            raise InvariantError("blocks are cached though the prefix cache is off")

    def _holders(self) -> Counter[int]:
        holders: Counter[int] = Counter()
        for table in self._tables.values():
            holders.update(table)
        for lease in self.leases:
            holders.update(lease.block_ids)
        return holders
