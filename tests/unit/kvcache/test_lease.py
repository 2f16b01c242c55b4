"""The life of a lease: who may change it, when it ends, and what it gives back."""

from __future__ import annotations

from itertools import product

import pytest

from kvcache.errors import InvariantError, TransferError, TransferFault
from kvcache.lease import REMEMBERED_ENDS, BlockLease, LeaseState
from kvcache.manager import KVCacheManager

TTL_S = 10.0  # of the manager fixture
DRAWN_TRANSITIONS = {  # the picture in the module's docstring
    (LeaseState.RESERVED, LeaseState.SENDING),
    (LeaseState.RESERVED, LeaseState.ABORTED),
    (LeaseState.SENDING, LeaseState.COMMITTED),
    (LeaseState.SENDING, LeaseState.ABORTED),
}


def open_lease(manager: KVCacheManager, request_id: str = "r", now: float = 0.0, epoch: int = 1) -> BlockLease:
    """A lease on two blocks that the sequence ``request_id`` holds as well."""
    assert manager.extend(request_id, 8)
    return manager.leases.open(f"transfer-{request_id}", request_id, manager.block_table(request_id), now, epoch)


def close(manager: KVCacheManager, *leases: BlockLease) -> None:
    for lease in leases:
        manager.leases.abort(lease)
        manager.free(lease.request_id)


def references(manager: KVCacheManager, lease: BlockLease) -> list[int]:
    return [manager.pool.references(block_id) for block_id in lease.block_ids]


def fault_of(manager: KVCacheManager, transfer_id: str, epoch: int, now: float) -> TransferFault:
    with pytest.raises(TransferError) as caught:
        manager.leases.find(transfer_id, epoch, now)
    return caught.value.fault


@pytest.mark.parametrize(("before", "after"), [*product(LeaseState, LeaseState)])
def test_a_lease_moves_as_drawn_and_no_other_way(before: LeaseState, after: LeaseState) -> None:
    lease = BlockLease("transfer", 1, "r", (), 0.0, before)
    if (before, after) in DRAWN_TRANSITIONS:
        lease.move_to(after)
        assert lease.state is after
    else:
        with pytest.raises(InvariantError, match=f"from {before.value} to {after.value}"):
            lease.move_to(after)
        assert lease.state is before


@pytest.mark.parametrize("state", list(LeaseState))
def test_a_lease_is_open_until_it_is_committed_or_aborted(state: LeaseState) -> None:
    ended = {LeaseState.COMMITTED, LeaseState.ABORTED}
    assert BlockLease("transfer", 1, "r", (), 0.0, state).is_open is (state not in ended)


def test_an_open_lease_adds_a_reference_to_each_of_its_blocks(manager: KVCacheManager) -> None:
    lease = open_lease(manager)
    assert references(manager, lease) == [2, 2]
    assert (len(manager.leases), manager.leases.num_blocks) == (1, 2)
    close(manager, lease)


def test_a_lease_keeps_the_blocks_of_a_sequence_that_has_ended(manager: KVCacheManager) -> None:
    lease = open_lease(manager)
    manager.free("r")
    assert references(manager, lease) == [1, 1]
    assert manager.num_free == 6
    close(manager, lease)


def test_commit_gives_the_references_back_and_forgets_the_lease(manager: KVCacheManager) -> None:
    lease = open_lease(manager)
    manager.leases.start_sending(lease)
    manager.leases.commit(lease)
    assert (lease.state, references(manager, lease), len(manager.leases)) == (LeaseState.COMMITTED, [1, 1], 0)
    close(manager, lease)


@pytest.mark.parametrize("sending", [False, True])
def test_abort_gives_the_references_back_and_forgets_the_lease(manager: KVCacheManager, sending: bool) -> None:
    lease = open_lease(manager)
    if sending:
        manager.leases.start_sending(lease)
    manager.leases.abort(lease)
    assert (lease.state, references(manager, lease), len(manager.leases)) == (LeaseState.ABORTED, [1, 1], 0)
    close(manager, lease)


def test_abort_twice_gives_back_once(manager: KVCacheManager) -> None:
    lease = open_lease(manager)
    manager.leases.abort(lease)
    manager.leases.abort(lease)
    assert references(manager, lease) == [1, 1]
    close(manager, lease)


def test_abort_after_commit_changes_nothing(manager: KVCacheManager) -> None:
    lease = open_lease(manager)
    manager.leases.start_sending(lease)
    manager.leases.commit(lease)
    manager.leases.abort(lease)
    assert (lease.state, references(manager, lease)) == (LeaseState.COMMITTED, [1, 1])
    close(manager, lease)


def test_a_late_abort_does_not_touch_the_next_lease_of_the_same_transfer(manager: KVCacheManager) -> None:
    first = open_lease(manager)
    manager.leases.abort(first)
    second = open_lease(manager, epoch=2)
    manager.leases.abort(first)
    assert (second.is_open, references(manager, second)) == (True, [2, 2])
    close(manager, second)


def test_a_reserved_lease_cannot_be_committed(manager: KVCacheManager) -> None:
    lease = open_lease(manager)
    with pytest.raises(InvariantError, match="from reserved to committed"):
        manager.leases.commit(lease)
    assert references(manager, lease) == [2, 2]
    close(manager, lease)


def test_a_transfer_has_one_open_lease(manager: KVCacheManager) -> None:
    lease = open_lease(manager)
    with pytest.raises(InvariantError, match="already has a lease"):
        manager.leases.open(lease.transfer_id, "r", lease.block_ids, now=0.0)
    assert references(manager, lease) == [2, 2]
    close(manager, lease)


def test_free_blocks_cannot_be_leased(manager: KVCacheManager) -> None:
    with pytest.raises(InvariantError, match="block 3 is free"):
        manager.leases.open("transfer", "r", [3], now=0.0)
    assert len(manager.leases) == 0


def test_a_message_finds_the_lease_of_its_transfer_and_epoch(manager: KVCacheManager) -> None:
    lease, other = open_lease(manager, "a", epoch=3), open_lease(manager, "b")
    assert manager.leases.find("transfer-a", 3, now=1.0) is lease
    close(manager, lease, other)


def test_an_unknown_transfer_is_refused(manager: KVCacheManager) -> None:
    lease = open_lease(manager)
    assert fault_of(manager, "transfer-x", 1, now=0.0) is TransferFault.UNKNOWN_TRANSFER
    close(manager, lease)


def test_the_epoch_of_a_transfer_that_is_over_is_stale(manager: KVCacheManager) -> None:
    lease = open_lease(manager)
    manager.leases.abort(lease)
    assert fault_of(manager, lease.transfer_id, 1, now=0.0) is TransferFault.STALE_EPOCH
    close(manager, lease)


def test_of_transfers_that_are_over_the_oldest_are_forgotten(manager: KVCacheManager) -> None:
    leases = [manager.leases.open(f"t{index}", "r", [], now=0.0) for index in range(REMEMBERED_ENDS + 1)]
    for lease in leases:
        manager.leases.abort(lease)
    assert fault_of(manager, "t0", 1, now=0.0) is TransferFault.UNKNOWN_TRANSFER
    assert fault_of(manager, "t1", 1, now=0.0) is TransferFault.STALE_EPOCH


@pytest.mark.parametrize("epoch", [0, 1, 3, 2**64 - 1])
def test_any_epoch_but_its_own_is_refused(manager: KVCacheManager, epoch: int) -> None:
    lease = open_lease(manager, epoch=2)
    assert fault_of(manager, lease.transfer_id, epoch, now=0.0) is TransferFault.STALE_EPOCH
    close(manager, lease)


def test_a_lease_is_good_until_just_before_its_time(manager: KVCacheManager) -> None:
    lease = open_lease(manager, now=100.0)
    assert manager.leases.find(lease.transfer_id, 1, now=100.0 + TTL_S - 0.001) is lease
    assert fault_of(manager, lease.transfer_id, 1, now=100.0 + TTL_S) is TransferFault.EXPIRED
    close(manager, lease)


def test_renewing_gives_a_full_term_from_now(manager: KVCacheManager) -> None:
    lease = open_lease(manager, now=0.0)
    manager.leases.renew(lease, now=7.0)
    assert manager.leases.find(lease.transfer_id, 1, now=7.0 + TTL_S - 0.001) is lease
    assert fault_of(manager, lease.transfer_id, 1, now=7.0 + TTL_S) is TransferFault.EXPIRED
    close(manager, lease)


def test_an_expired_lease_keeps_its_blocks_until_it_is_aborted(manager: KVCacheManager) -> None:
    lease = open_lease(manager)
    manager.free("r")
    assert fault_of(manager, lease.transfer_id, 1, now=TTL_S) is TransferFault.EXPIRED
    assert manager.num_free == 6
    close(manager, lease)
