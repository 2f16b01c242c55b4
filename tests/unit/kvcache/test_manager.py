"""Who holds which blocks, and that the books are checked."""

from __future__ import annotations

import pytest

from kvcache.errors import InvariantError
from kvcache.manager import KVCacheManager
from kvcache.prefix import HashChain
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
    manager.pool._free[0] = None
    with pytest.raises(InvariantError, match="block 0 has 1 references; in free queue: True"):
        manager.check_integrity()


def test_integrity_finds_an_unheld_block_outside_the_free_queue() -> None:
    manager = make_manager(num_blocks=8)
    del manager.pool._free[6]
    with pytest.raises(InvariantError, match="block 6 has 0 references; in free queue: False"):
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


# The prefix cache. Blocks hold four tokens.

HASHES = HashChain(b"", 4).hashes(range(32))


def cache_one(manager: KVCacheManager, num_blocks: int, name: str = "first") -> list[int]:
    """A sequence whose first blocks are whole and cached; it is over."""
    assert manager.extend(name, 4 * num_blocks)
    block_ids = list(manager.block_table(name))
    manager.cache(name, HASHES[:num_blocks])
    manager.free(name)
    return block_ids


def test_a_sequence_begins_with_the_blocks_of_one_that_is_over(manager: KVCacheManager) -> None:
    block_ids = cache_one(manager, 3)
    assert manager.num_free == 8
    prefix = manager.find_prefix(HASHES)
    assert prefix == block_ids
    assert manager.begin("second", 17, prefix)
    assert manager.block_table("second")[:3] == block_ids
    assert (len(manager.block_table("second")), manager.num_free) == (5, 3)
    manager.free("second")


def test_two_sequences_hold_the_same_cached_blocks_and_others_of_their_own(manager: KVCacheManager) -> None:
    prefix = cache_one(manager, 2)
    manager.begin("a", 12, prefix)
    manager.begin("b", 12, prefix)
    assert manager.num_free == 8 - 4
    assert [manager.pool.references(block_id) for block_id in prefix] == [2, 2]
    assert set(manager.block_table("a")) & set(manager.block_table("b")) == set(prefix)
    manager.check_integrity()
    manager.free("a")
    assert manager.num_free == 8 - 3
    manager.free("b")


@pytest.mark.parametrize("num_held", [0, 1, 2, 3])
def test_free_cached_blocks_are_used_up_by_beginning_with_them(manager: KVCacheManager, num_held: int) -> None:
    prefix = cache_one(manager, 3)
    manager.begin("holder", 4 * num_held, prefix[:num_held])
    assert manager.num_blocks_to_begin(20, prefix) == 2 + (3 - num_held)
    before = manager.num_free
    manager.begin("second", 20, prefix)
    assert before - manager.num_free == 2 + (3 - num_held)
    manager.free("holder")
    manager.free("second")


def test_a_beginning_that_does_not_fit_takes_nothing(manager: KVCacheManager) -> None:
    prefix = cache_one(manager, 3)
    manager.extend("other", 12)
    assert manager.num_free == 5
    assert not manager.begin("second", 24, prefix)  # three cached ones and three new ones
    assert (manager.num_free, manager.block_table("second")) == (5, [])
    assert manager.begin("second", 20, prefix)
    manager.free("other")
    manager.free("second")


def test_new_blocks_are_not_taken_from_the_prefix(manager: KVCacheManager) -> None:
    """Not even when the prefix is what was freed first."""
    prefix = cache_one(manager, 4)
    manager.extend("other", 16)
    manager.free("other")
    manager.begin("second", 32, prefix)
    assert len(set(manager.block_table("second"))) == 8
    manager.free("second")


def test_the_tail_of_a_sequence_is_evicted_before_its_head(manager: KVCacheManager) -> None:
    block_ids = cache_one(manager, 8)
    for num_evicted in range(1, 5):
        assert manager.extend("other", 4 * num_evicted)
        assert manager.find_prefix(HASHES) == block_ids[: 8 - num_evicted]
    manager.free("other")


def test_the_tail_is_evicted_first_when_a_lease_held_the_blocks_last(manager: KVCacheManager) -> None:
    manager.extend("first", 32)
    block_ids = list(manager.block_table("first"))
    manager.cache("first", HASHES)
    lease = manager.leases.open("transfer", "first", block_ids, now=0.0)
    manager.free("first")
    manager.leases.abort(lease)
    manager.extend("other", 8)
    assert manager.find_prefix(HASHES) == block_ids[:6]
    manager.free("other")


def test_blocks_of_the_middle_are_cached_where_they_stand(manager: KVCacheManager) -> None:
    manager.extend("r", 12)
    block_ids = list(manager.block_table("r"))
    manager.cache("r", HASHES[:1])
    manager.cache("r", HASHES[1:3], first_block=1)
    assert manager.find_prefix(HASHES) == block_ids
    manager.free("r")


def test_a_sequence_that_has_blocks_cannot_begin(manager: KVCacheManager) -> None:
    manager.extend("r", 4)
    with pytest.raises(InvariantError, match="has blocks already"):
        manager.begin("r", 8)
    manager.free("r")


def test_without_the_prefix_cache_nothing_is_cached() -> None:
    manager = make_manager(num_blocks=8, prefix_caching=False)
    cache_one(manager, 3)
    assert manager.find_prefix(HASHES) == []
    manager.check_idle()


def test_nobody_gets_the_blocks_of_a_sequence_that_is_distrusted(manager: KVCacheManager) -> None:
    prefix = cache_one(manager, 2)
    manager.begin("bystander", 12, prefix)
    manager.begin("suspect", 12, prefix)
    manager.cache("suspect", HASHES[2:3], first_block=2)
    manager.distrust("suspect")
    assert manager.find_prefix(HASHES) == []
    assert manager.block_table("bystander")[:2] == prefix  # who has them goes on
    manager.free("suspect")
    manager.free("bystander")


def test_a_shared_or_cached_block_may_not_be_written(manager: KVCacheManager) -> None:
    prefix = cache_one(manager, 1)
    manager.begin("r", 12, prefix)
    manager.check_writable("r", 1, 3)
    with pytest.raises(InvariantError, match="may not be written"):
        manager.check_writable("r", 0, 1)
    own = manager.leases.open("own", "r", manager.block_table("r")[1:], now=0.0)
    manager.check_writable("r", 1, 3)
    other = manager.leases.open("other", "other", manager.block_table("r")[2:], now=0.0)
    with pytest.raises(InvariantError, match="may not be written"):
        manager.check_writable("r", 1, 3)
    manager.leases.abort(own)
    manager.leases.abort(other)
    manager.free("r")


def test_integrity_finds_an_indexed_block_that_does_not_exist() -> None:
    manager = make_manager(num_blocks=8)
    manager.pool.prefixes.add(b"a", 8)
    with pytest.raises(InvariantError, match="does not exist"):
        manager.check_integrity()


def test_integrity_finds_a_cached_block_though_the_cache_is_off() -> None:
    manager = make_manager(num_blocks=8, prefix_caching=False)
    manager.pool.prefixes.add(b"a", 1)
    with pytest.raises(InvariantError, match="the prefix cache is off"):
        manager.check_integrity()


def test_integrity_looks_into_the_index() -> None:
    manager = make_manager(num_blocks=8)
    manager.pool.prefixes._hash_of[3] = b"a"
    with pytest.raises(InvariantError, match="inverse differ"):
        manager.check_integrity()
