"""Who has which prefix: deltas in, workers out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.prefix import HashChain, PrefixIndex
from scheduler import cache_index
from scheduler.cache_index import MAX_HASHES, CacheIndex, hashes_of_prompt, pack_names
from scheduler.types import CacheDelta, PrefixHashes
from tests.builders import make_spec, make_worker, repeatable
from workers.cache_news import CacheNews

CHAIN = PrefixHashes(4, 4, (8, 7, 6, 5, 4, 3, 2, 1))


def packed(*names: int) -> bytes:
    return b"".join(name.to_bytes(8, "little") for name in names)


def cached(index: CacheIndex, worker_id: str, prefix: PrefixHashes = CHAIN, num_prompt_tokens: int = 100) -> int:
    info = make_worker(worker_id, spec=make_spec(block_size=4))
    return index.cached_tokens(info, (prefix,), num_prompt_tokens)


@pytest.fixture
def index() -> CacheIndex:
    index = CacheIndex()
    for worker_id, depth in (("a", 2), ("b", 5), ("c", 0)):
        assert index.apply(worker_id, CacheDelta(0, packed(*range(1, depth + 1))))
    return index


def test_each_worker_has_as_much_as_it_published(index: CacheIndex) -> None:
    assert [cached(index, worker_id) for worker_id in ("a", "b", "c", "unknown")] == [8, 20, 0, 0]


def test_the_last_token_is_never_cached(index: CacheIndex) -> None:
    assert [cached(index, "b", num_prompt_tokens=number) for number in (19, 20, 21)] == [16, 16, 20]


def test_hashes_of_another_block_size_say_nothing(index: CacheIndex) -> None:
    assert cached(index, "b", PrefixHashes(8, 8, CHAIN.hashes)) == 0


def test_those_with_most_of_a_prompt_come_first(index: CacheIndex) -> None:
    assert index.deepest(CHAIN, 2) == ["b", "a"]
    assert index.deepest(CHAIN, 1) == ["b"]
    assert index.deepest(PrefixHashes(4, 4, (99,)), 2) == []


def test_a_delta_adds_and_removes(index: CacheIndex) -> None:
    assert index.apply("b", CacheDelta(1, added=packed(77), removed=packed(5, 4, 1234)))
    assert cached(index, "b") == 12
    assert index.deepest(PrefixHashes(4, 4, (77,)), 2) == ["b"]


@pytest.mark.parametrize("sequence", [1, 3])
def test_after_a_gap_nothing_is_known_until_the_worker_begins_anew(index: CacheIndex, sequence: int) -> None:
    assert index.apply("b", CacheDelta(1))
    assert not index.apply("b", CacheDelta(sequence, packed(6)))
    assert cached(index, "b") == 0
    assert not index.apply("b", CacheDelta(2, packed(6)))
    assert index.apply("b", CacheDelta(0, packed(1)))
    assert cached(index, "b") == 4


def test_a_worker_that_is_forgotten_leaves_nothing_behind(index: CacheIndex) -> None:
    for worker_id in "abc":
        index.forget(worker_id)
    assert not index._holders
    assert not index._names


def test_a_worker_cannot_fill_the_memory(index: CacheIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_index, "MAX_NAMES_PER_WORKER", 3)
    assert index.apply("c", CacheDelta(1, packed(1, 2, 3, 4, 5)))
    assert cached(index, "c") == 12


# What is sent along with a prompt


def test_a_short_prompt_sends_the_name_of_every_full_block() -> None:
    prompt = range(1, 12)
    names = HashChain(b"salt", 4).hashes(tuple(prompt))
    assert hashes_of_prompt(b"salt", 4, prompt) == PrefixHashes(
        4, 4, tuple(int.from_bytes(name[:8], "little") for name in reversed(names))
    )
    assert len(names) == 2


def test_a_long_prompt_sends_names_evenly_spread_and_not_too_many() -> None:
    prompt = [token % 1000 for token in range(4 * 100)]
    sent = hashes_of_prompt(b"", 4, prompt)
    names = [int.from_bytes(name[:8], "little") for name in HashChain(b"", 4).hashes(prompt)]
    assert (sent.tokens_per_hash, len(sent.hashes)) == (28, 14)
    assert list(sent.hashes) == names[6::7][::-1]
    assert len(hashes_of_prompt(b"", 1, [1] * 100_000).hashes) <= MAX_HASHES


# From a worker's cache to the index


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=30), st.integers(1, 4))
@repeatable(60)
def test_the_index_follows_a_workers_cache_whatever_is_lost(changes: list[tuple[bool, int]], limit: int) -> None:
    """Blocks come and go; now and then a delta is lost, and the worker is asked to begin anew."""
    prefixes, index = PrefixIndex(), CacheIndex()
    news = CacheNews(prefixes, max_names=limit)
    hashes = HashChain(b"", 1).hashes(range(10))
    for step, (comes, number) in enumerate(changes):
        if comes:
            prefixes.add(hashes[number], number)
        else:
            prefixes.forget(number)
        delta = news.take()
        is_lost = step % 7 == 3
        if delta is not None and not is_lost and not index.apply("w", delta):
            news.begin_anew()
    prefixes.forget(0)
    prefixes.add(hashes[0], 0)  # a gap is seen with the next delta
    for _ in range(25):
        delta = news.take()
        if delta is not None and not index.apply("w", delta):
            news.begin_anew()
    here = {int.from_bytes(hashes[block][:8], "little") for block in prefixes}
    assert index._names.get("w", set()) == here


def test_what_nobody_takes_is_given_up_and_told_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.prefix.MAX_NEWS", 2)
    prefixes = PrefixIndex()
    news = CacheNews(prefixes)
    assert news.take() == CacheDelta(0)
    hashes = HashChain(b"", 1).hashes(range(10))
    for block in range(10):
        prefixes.add(hashes[block], block)
        prefixes.forget(block)
    prefixes.add(hashes[0], 0)
    assert not prefixes.tells
    assert news.take() == CacheDelta(0, pack_names(hashes[:1]))
    assert news.take() is None
