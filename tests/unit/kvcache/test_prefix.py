"""Names of blocks, and the index from a name to the block."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.errors import InvariantError
from kvcache.prefix import HashChain, PrefixIndex
from tests.builders import repeatable

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def reference_hash(salt: bytes, token_ids: Sequence[int], block_size: int, index: int) -> bytes:
    """Of one block, from the start."""
    digest = hashlib.sha256(salt).digest()
    for start in range(0, (index + 1) * block_size, block_size):
        block = token_ids[start : start + block_size]
        digest = hashlib.sha256(digest + b"".join(token_id.to_bytes(4, "little") for token_id in block)).digest()
    return digest


def hashes(token_ids: Sequence[int], salt: bytes = b"", block_size: int = 4) -> list[bytes]:
    return list(HashChain(salt, block_size).hashes(token_ids))


@given(token_ids=TOKENS, block_size=st.integers(1, 9), cuts=st.lists(st.integers(0, 40), max_size=5))
@repeatable(100)
def test_a_chain_that_grows_gives_the_hashes_of_the_whole(
    token_ids: list[int], block_size: int, cuts: list[int]
) -> None:
    chain = HashChain(b"salt", block_size)
    for end in sorted(cuts):
        chain.hashes(token_ids[:end])
    num_blocks = len(token_ids) // block_size
    expected = [reference_hash(b"salt", token_ids, block_size, index) for index in range(num_blocks)]
    assert list(chain.hashes(token_ids)) == expected


def test_only_full_blocks_have_a_hash() -> None:
    assert [len(hashes(range(count))) for count in (0, 1, 3, 4, 7, 8)] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("position", range(12))
def test_a_token_changes_the_hashes_of_its_block_and_of_all_after_it(position: int) -> None:
    token_ids = list(range(12))
    changed = [*token_ids[:position], 99, *token_ids[position + 1 :]]
    same = [one == other for one, other in zip(hashes(token_ids), hashes(changed), strict=True)]
    assert same == [index < position // 4 for index in range(3)]


def test_the_same_tokens_with_another_salt_share_no_hash() -> None:
    salts = (b"", b"a", b"b", bytes(32))
    named = [block_hash for salt in salts for block_hash in hashes(range(12), salt)]
    assert len(set(named)) == 3 * len(salts)


def test_the_longest_prefix_ends_at_the_first_hash_that_is_not_there() -> None:
    index = PrefixIndex()
    for block_hash, block_id in [(b"a", 7), (b"b", 3), (b"d", 5)]:
        index.add(block_hash, block_id)
    assert index.longest_prefix([b"a", b"b", b"c", b"d"]) == [7, 3]
    assert index.longest_prefix([b"x", b"a"]) == []
    assert index.longest_prefix([]) == []


def test_the_first_block_with_some_kv_stays_and_the_second_is_not_indexed() -> None:
    index = PrefixIndex()
    index.add(b"a", 7)
    index.add(b"a", 8)
    assert index.longest_prefix([b"a"]) == [7]
    assert (7 in index, 8 in index, len(index)) == (True, False, 1)


def test_a_forgotten_block_is_found_no_more_and_may_hold_something_else() -> None:
    index = PrefixIndex()
    index.add(b"a", 7)
    index.forget(7)
    index.forget(7)
    assert index.longest_prefix([b"a"]) == []
    index.add(b"b", 7)
    assert list(index) == [7]
    index.check_integrity()


def test_a_block_cannot_hold_the_kv_of_two_prefixes() -> None:
    index = PrefixIndex()
    index.add(b"a", 7)
    index.add(b"a", 7)
    with pytest.raises(InvariantError, match="block 7 is indexed with other tokens"):
        index.add(b"b", 7)


def test_integrity_finds_a_hash_and_a_block_that_do_not_name_each_other() -> None:
    index = PrefixIndex()
    index.add(b"a", 7)
    index._hash_of[7] = b"b"
    with pytest.raises(InvariantError, match="inverse differ"):
        index.check_integrity()


def test_integrity_finds_a_block_under_two_hashes() -> None:
    index = PrefixIndex()
    index._block_of = {b"a": 7, b"b": 7}
    index._hash_of = {7: b"b"}
    with pytest.raises(InvariantError, match="in the prefix index twice"):
        index.check_integrity()
