"""Who holds which blocks, and that the books are checked."""

from __future__ import annotations

import pytest

from kvcache.errors import InvariantError
from kvcache.manager import KVCacheManager
from tests.builders import make_manager


def test_a_block_table_covers_its_tokens(manager: KVCacheManager) -> None:
    for num_tokens, num_blocks in [(1, 1), (4, 1), (5, 2), (12, 3), (13, 4)]:
        assert manager.extend("r", num_tokens)
        assert len(set(manager.block_table("r"))) == num_blocks
    manager.free("r")


def test_extending_keeps_the_blocks_that_are_there_in_order(manager: KVCacheManager) -> None:
    manager.extend("r", 6)
    before = list(manager.block_table("r"))
    manager.extend("other", 4)
    manager.extend("r", 16)
    assert manager.block_table("r")[:2] == before
    manager.free("r")
    manager.free("other")


def test_extending_to_fewer_tokens_changes_nothing(manager: KVCacheManager) -> None:
    manager.extend("r", 16)
    before = list(manager.block_table("r"))
    assert manager.extend("r", 3)
    assert manager.block_table("r") == before
    manager.free("r")


def test_sequences_share_no_block(manager: KVCacheManager) -> None:
    manager.extend("a", 16)
    manager.extend("b", 16)
    assert set(manager.block_table("a")).isdisjoint(manager.block_table("b"))
    manager.free("a")
    manager.free("b")


@pytest.mark.parametrize("num_tokens_before", [0, 4])
def test_an_extension_that_does_not_fit_takes_nothing(manager: KVCacheManager, num_tokens_before: int) -> None:
    manager.extend("other", 20)
    manager.extend("r", num_tokens_before)
    before, free = list(manager.block_table("r")), manager.num_free
    assert not manager.extend("r", 17)
    assert (manager.block_table("r"), manager.num_free) == (before, free)
    manager.free("r")
    manager.free("other")


def test_one_sequence_can_fill_the_cache(manager: KVCacheManager) -> None:
    assert manager.max_tokens == 32
    assert manager.extend("r", 32)
    assert not manager.extend("r", 33)
    manager.free("r")


def test_freeing_gives_all_blocks_back(manager: KVCacheManager) -> None:
    manager.extend("r", 20)
    manager.free("r")
    assert (manager.num_free, manager.block_table("r")) == (8, [])


def test_freeing_an_unknown_sequence_changes_nothing(manager: KVCacheManager) -> None:
    manager.free("nobody")
    assert manager.num_free == 8


def test_every_block_is_accounted_for_while_sequences_and_leases_hold_some(manager: KVCacheManager) -> None:
    manager.extend("a", 8)
    manager.extend("b", 8)
    lease = manager.leases.open("transfer", "a", manager.block_table("a"), now=0.0)
    manager.free("a")
    assert manager.num_unaccounted() == 0
    manager.free("b")
    manager.leases.abort(lease)


def test_a_block_without_a_holder_is_unaccounted_for() -> None:
    manager = make_manager(num_blocks=8)
    manager.pool.allocate(3)
    assert manager.num_unaccounted() == 3


def test_integrity_finds_a_block_that_was_lost() -> None:
    manager = make_manager(num_blocks=8)
    manager.pool.allocate(1)
    with pytest.raises(InvariantError, match="block 0 has 1 references and 0 holders"):
        manager.check_integrity()


def test_integrity_finds_a_reference_too_few() -> None:
    manager = make_manager(num_blocks=8)
    manager.extend("r", 4)
    manager.pool.release(manager.block_table("r"))
    with pytest.raises(InvariantError, match="block 0 has 0 references and 1 holders"):
        manager.check_integrity()


def test_integrity_finds_a_reference_too_many() -> None:
    manager = make_manager(num_blocks=8)
    manager.extend("r", 4)
    manager.pool.retain(manager.block_table("r"))
    with pytest.raises(InvariantError, match="block 0 has 2 references and 1 holders"):
        manager.check_integrity()


def test_integrity_finds_a_free_block_that_is_held() -> None:
    manager = make_manager(num_blocks=8)
    manager.extend("r", 4)
    manager.pool._free.append(0)
    with pytest.raises(InvariantError, match="block 0 has 1 references; in free queue: True"):
        manager.check_integrity()


def test_integrity_finds_an_unheld_block_outside_the_free_queue() -> None:
    manager = make_manager(num_blocks=8)
    manager.pool._free.remove(6)
    with pytest.raises(InvariantError, match="block 6 has 0 references; in free queue: False"):
        manager.check_integrity()


def test_integrity_finds_a_block_that_is_free_twice() -> None:
    manager = make_manager(num_blocks=8)
    manager.pool._free.append(2)
    with pytest.raises(InvariantError, match="in the free queue twice"):
        manager.check_integrity()


def test_the_no_leak_check_names_the_sequence_and_the_lease_that_hold_blocks(manager: KVCacheManager) -> None:
    manager.extend("holder", 4)
    manager.extend("leased", 4)
    lease = manager.leases.open("transfer", "leased", manager.block_table("leased"), now=0.0)
    manager.free("leased")
    with pytest.raises(InvariantError, match=r"2 of 8 .* sequences \['holder'\] and leases \['transfer'\]"):
        manager.check_idle()
    manager.free("holder")
    manager.leases.abort(lease)
