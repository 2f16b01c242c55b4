"""Free blocks and reference counts."""

from __future__ import annotations

import pytest

from kvcache.block_pool import BlockPool
from kvcache.errors import ConfigError, InvariantError
from kvcache.manager import KVCacheManager


@pytest.fixture
def pool(manager: KVCacheManager) -> BlockPool:
    """Eight blocks; its manager's no-leak check runs when the test is over."""
    return manager.pool


def take(pool: BlockPool, count: int) -> list[int]:
    block_ids = pool.allocate(count)
    assert block_ids is not None
    return block_ids


def test_a_new_pool_is_free() -> None:
    pool = BlockPool(8)
    assert (pool.num_free, pool.free_block_ids()) == (8, frozenset(range(8)))


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_without_blocks_is_refused(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match="at least one block"):
        BlockPool(num_blocks)


def test_allocated_blocks_are_distinct_and_have_one_reference(pool: BlockPool) -> None:
    block_ids = take(pool, 3) + take(pool, 5)
    assert sorted(block_ids) == list(range(8))
    assert [pool.references(block_id) for block_id in block_ids] == [1] * 8
    assert pool.num_free == 0
    pool.release(block_ids)


def test_allocating_more_than_there_are_takes_nothing(pool: BlockPool) -> None:
    block_ids = take(pool, 6)
    free = pool.free_block_ids()
    assert pool.allocate(3) is None
    assert pool.free_block_ids() == free
    pool.release(block_ids)


def test_allocating_nothing_always_succeeds(pool: BlockPool) -> None:
    block_ids = take(pool, 8)
    assert pool.allocate(0) == []
    pool.release(block_ids)


def test_a_retained_block_is_freed_by_its_last_release(pool: BlockPool) -> None:
    block_ids = take(pool, 1)
    pool.retain(block_ids)
    pool.release(block_ids)
    assert (pool.references(block_ids[0]), pool.num_free) == (1, 7)
    pool.release(block_ids)
    assert (pool.references(block_ids[0]), pool.num_free) == (0, 8)


def test_a_freed_block_is_the_last_to_be_used_again(pool: BlockPool) -> None:
    first = take(pool, 1)
    pool.release(first)
    block_ids = take(pool, 8)
    assert block_ids[-1:] == first
    pool.release(block_ids)


def test_a_free_block_cannot_be_retained(pool: BlockPool) -> None:
    with pytest.raises(InvariantError, match="block 5 is free"):
        pool.retain([5])


def test_a_block_cannot_be_released_more_often_than_taken(pool: BlockPool) -> None:
    block_ids = take(pool, 1)
    pool.release(block_ids)
    with pytest.raises(InvariantError, match="released more often"):
        pool.release(block_ids)


def test_a_free_block_that_is_indexed_can_be_shared_and_leaves_the_queue(pool: BlockPool) -> None:
    first, second = take(pool, 2)
    pool.prefixes.add(b"a", second)
    pool.release([first, second])
    pool.share([second])
    assert (pool.references(second), pool.num_free) == (1, 7)
    assert second not in pool.free_block_ids()
    rest = take(pool, 7)
    assert second not in rest
    pool.release([second, *rest])


def test_a_block_in_use_is_shared_by_counting(pool: BlockPool) -> None:
    (block_id,) = take(pool, 1)
    pool.prefixes.add(b"a", block_id)
    pool.share([block_id])
    pool.release([block_id])
    assert (pool.references(block_id), pool.num_free) == (1, 7)
    pool.release([block_id])


def test_a_block_that_is_not_indexed_cannot_be_shared(pool: BlockPool) -> None:
    block_ids = take(pool, 1)
    for block_id in (*block_ids, 5):
        with pytest.raises(InvariantError, match="cannot be shared"):
            pool.share([block_id])
    pool.release(block_ids)


def test_a_released_block_stays_indexed_until_it_is_allocated_again(pool: BlockPool) -> None:
    (block_id,) = take(pool, 1)
    pool.prefixes.add(b"a", block_id)
    pool.release([block_id])
    others = take(pool, 7)
    assert pool.prefixes.longest_prefix([b"a"]) == [block_id]
    assert take(pool, 1) == [block_id]
    assert pool.prefixes.longest_prefix([b"a"]) == []
    pool.release([block_id, *others])


def test_the_least_recently_used_block_is_used_again_first(pool: BlockPool) -> None:
    block_ids = take(pool, 8)
    for block_id in block_ids:
        pool.prefixes.add(bytes([block_id]), block_id)
    pool.release(block_ids)
    used_again = block_ids[2]
    pool.share([used_again])
    pool.release([used_again])
    order = take(pool, 8)
    assert order == [block_id for block_id in block_ids if block_id != used_again] + [used_again]
    pool.release(order)
