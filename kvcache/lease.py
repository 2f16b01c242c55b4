"""The right to write into, or read from, a set of blocks during one handoff, until a time.

Each side of a handoff holds a lease of its own: the decode side on the blocks it reserved, the prefill side
on the blocks it sends. A lease owns one reference to each of its blocks, so they cannot be used for anything
else while it is open, whatever happens to the request.

::

    RESERVED ──► SENDING ──► COMMITTED
        │           │
        └───────────┴──────► ABORTED      (refused, cancelled, peer lost or expired)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvcache.block_pool import BlockPool
from kvcache.errors import InvariantError, TransferError, TransferFault

REMEMBERED_ENDS = 4096  # transfers that have ended, by whose ids a late message is told from a wrong one


class LeaseState(StrEnum):
    RESERVED = "reserved"
    SENDING = "sending"
    COMMITTED = "committed"
    ABORTED = "aborted"


_LEGAL = {
    LeaseState.RESERVED: {LeaseState.SENDING, LeaseState.ABORTED},
    LeaseState.SENDING: {LeaseState.COMMITTED, LeaseState.ABORTED},
    LeaseState.COMMITTED: set(),
    LeaseState.ABORTED: set(),
}


@dataclass(slots=True, eq=False)
class BlockLease:
    """One side of one handoff. Changed by its ``LeaseTable`` only.

    ``block_ids[i]`` is the sequence's logical block ``first_block + i``: those before it are no part of the
    handoff, because the decode side holds them already.
    Messages of another ``epoch`` are refused. Workers open a lease with a new id for each sender, at epoch 1.
    ``expires_at_s`` is on the monotonic clock of the process that holds the lease. It bounds what the decode side waits
    and accepts; the prefill side's bound is ``send_kv``'s, which ends when its receiver takes nothing for a term.
    """

    transfer_id: str
    epoch: int
    request_id: str
    block_ids: tuple[int, ...]
    expires_at_s: float
    state: LeaseState = LeaseState.RESERVED
    first_block: int = 0
    num_tokens: int = 0  # of the prompt whose KV the blocks take, on the decode side
    num_verified_tokens: int = 0  # the first of them: verified in all layers, so they outlive a transfer that breaks

    @property
    def is_open(self) -> bool:
        return self.state in (LeaseState.RESERVED, LeaseState.SENDING)

    def move_to(self, state: LeaseState) -> None:
        if state not in _LEGAL[self.state]:
            raise InvariantError(f"lease {self.transfer_id} cannot go from {self.state.value} to {state.value}")
        self.state = state


class LeaseTable:
    """The open leases of one worker. Time is an argument; nothing here reads a clock."""

    def __init__(self, pool: BlockPool, ttl_s: float) -> None:
        self._pool = pool
        self._ttl_s = ttl_s
        self._open: dict[str, BlockLease] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()  # ids, the oldest first

    def __iter__(self) -> Iterator[BlockLease]:
        return iter(self._open.values())

    def __len__(self) -> int:
        return len(self._open)

    @property
    def num_blocks(self) -> int:
        return sum(len(lease.block_ids) for lease in self)

    def open(
        self,
        transfer_id: str,
        request_id: str,
        block_ids: Sequence[int],
        now: float,
        epoch: int = 1,
        first_block: int = 0,
        num_tokens: int = 0,
    ) -> BlockLease:
        """Starts a lease on blocks that are in use; adds a reference to each."""
        if transfer_id in self._open:
            raise InvariantError(f"transfer {transfer_id} already has a lease")
        self._pool.retain(block_ids)
        lease = BlockLease(
            transfer_id,
            epoch,
            request_id,
            tuple(block_ids),
            now + self._ttl_s,
            first_block=first_block,
            num_tokens=num_tokens,
        )
        self._open[transfer_id] = lease
        return lease

    def find(self, transfer_id: str, epoch: int, now: float) -> BlockLease:
        """The open lease that a message from the other side speaks of.

        Raises:
            TransferError: no such transfer here, it has expired, or the epoch is not its own. An epoch ends with its
                lease: what comes later, from a worker that was taken for dead, is of a stale one.
        """
        lease = self._open.get(transfer_id)
        if lease is None and transfer_id in self._ended:
            raise TransferError(TransferFault.STALE_EPOCH, f"epoch {epoch} of transfer {transfer_id} is over")
        if lease is None:
            raise TransferError(TransferFault.UNKNOWN_TRANSFER, f"no open transfer {transfer_id!r} here")
        if epoch != lease.epoch:
            raise TransferError(
                TransferFault.STALE_EPOCH, f"transfer {transfer_id} is at epoch {lease.epoch}, the message at {epoch}"
            )
        if now >= lease.expires_at_s:
            raise TransferError(TransferFault.EXPIRED, f"the lease of transfer {transfer_id} has run out")
        return lease

    def renew(self, lease: BlockLease, now: float) -> None:
        """The other side was heard of: the lease lasts another full term."""
        lease.expires_at_s = now + self._ttl_s

    def start_sending(self, lease: BlockLease) -> None:
        lease.move_to(LeaseState.SENDING)

    def commit(self, lease: BlockLease) -> None:
        """Everything arrived and was verified; the lease's own references are given back."""
        lease.move_to(LeaseState.COMMITTED)
        self._close(lease)

    def abort(self, lease: BlockLease) -> None:
        """Ends the lease without success. Harmless on a lease that has ended already."""
        if lease.is_open:
            lease.move_to(LeaseState.ABORTED)
            self._close(lease)

    def _close(self, lease: BlockLease) -> None:
        del self._open[lease.transfer_id]
        self._ended[lease.transfer_id] = None
        if len(self._ended) > REMEMBERED_ENDS:
            self._ended.popitem(last=False)
        self._pool.release(reversed(lease.block_ids))
