"""Who holds which heads, and which numbers of ranks are refused."""

from __future__ import annotations

import pytest

from kvcache.errors import ConfigError
from kvcache.heads import Shard, check_size, possible_sizes
from tests.builders import make_spec

MODELS = [(8, 8), (8, 4), (9, 3), (32, 8), (12, 1), (14, 2)]  # attention heads, KV heads


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), MODELS)
def test_a_rank_holds_the_kv_heads_that_its_attention_heads_read(num_heads: int, num_kv_heads: int) -> None:
    for size in possible_sizes(num_heads, num_kv_heads):
        for rank in range(size):
            shard = Shard(rank, size)
            read = {head * num_kv_heads // num_heads for head in shard.of(num_heads)}
            assert set(shard.kv_heads(num_kv_heads)) == read


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), MODELS)
def test_all_ranks_hold_as_many_heads_and_none_is_left_out(num_heads: int, num_kv_heads: int) -> None:
    for size in possible_sizes(num_heads, num_kv_heads):
        shards = [Shard(rank, size) for rank in range(size)]
        assert len({len(shard.kv_heads(num_kv_heads)) for shard in shards}) == 1
        assert {head for shard in shards for head in shard.kv_heads(num_kv_heads)} == set(range(num_kv_heads))


def test_with_more_ranks_than_kv_heads_neighbours_hold_the_same() -> None:
    assert [list(Shard(rank, 4).kv_heads(2)) for rank in range(4)] == [[0], [0], [1], [1]]


@pytest.mark.parametrize("total", [1, 7, 8, 49152])
def test_parts_follow_each_other_without_gap(total: int) -> None:
    parts = [Shard(rank, 3).of(total) for rank in range(3)]
    assert [number for part in parts for number in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_rank_s_cache_differs_in_its_heads_alone() -> None:
    spec = make_spec(num_kv_heads=6)
    assert Shard(1, 3).of_spec(spec) == make_spec(num_kv_heads=2)
    assert Shard(0, 12).of_spec(spec) == make_spec(num_kv_heads=1)
    assert Shard().of_spec(spec) == spec


@pytest.mark.parametrize(
    ("size", "num_heads", "num_kv_heads"),
    [(2, 9, 3), (4, 6, 2), (16, 8, 8), (4, 12, 6), (6, 12, 4)],
)
def test_heads_that_cannot_be_shared_out_are_refused_with_the_numbers(
    size: int, num_heads: int, num_kv_heads: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_size("--tensor-parallel-size", size, num_heads, num_kv_heads)
    for words in (f"--tensor-parallel-size is {size}", f"{num_heads} attention heads", f"{num_kv_heads} KV heads"):
        assert words in str(caught.value)


def test_the_refusal_names_what_would_do() -> None:
    with pytest.raises(ConfigError, match="among 1, 3, 9 ranks"):
        check_size("-tp", 2, 9, 3)
