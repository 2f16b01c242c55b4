"""The ranks' caches as one: blocks are cut by heads and put together again."""

from __future__ import annotations

import pytest
import torch

from kvcache.errors import InvariantError
from kvcache.heads import Shard
from kvcache.sharded_storage import ShardedStorage
from kvcache.storage import PagedStorage
from tests.builders import fill_with_noise, make_spec

NUM_BLOCKS = 5
CASES = [(1, 1), (4, 2), (4, 4), (6, 3), (2, 4), (1, 3)]  # KV heads, ranks


def make_sharded(num_kv_heads: int, size: int, dtype: str = "float32") -> tuple[ShardedStorage, list[PagedStorage]]:
    spec = make_spec(num_kv_heads=num_kv_heads, dtype=dtype)
    shards = [PagedStorage(Shard(rank, size).of_spec(spec), NUM_BLOCKS) for rank in range(size)]
    return ShardedStorage(spec, shards), shards


def make_whole(num_kv_heads: int, dtype: str = "float32", seed: int = 1) -> PagedStorage:
    whole = PagedStorage(make_spec(num_kv_heads=num_kv_heads, dtype=dtype), NUM_BLOCKS)
    fill_with_noise(whole, seed)
    return whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_kv_heads", "size"), CASES)
def test_a_written_block_gives_every_rank_its_heads(num_kv_heads: int, size: int, dtype: str) -> None:
    whole = make_whole(num_kv_heads, dtype)
    sharded, shards = make_sharded(num_kv_heads, size, dtype)
    sharded.write_blocks(1, [4, 2], whole.read_blocks(1, [0, 3]))
    for rank, shard in enumerate(shards):
        for local, head in enumerate(Shard(rank, size).kv_heads(num_kv_heads)):
            assert torch.equal(shard.layers[1][4, :, local], whole.layers[1][0, :, head])
            assert torch.equal(shard.layers[1][2, :, local], whole.layers[1][3, :, head])
        assert not shard.layers[1][[0, 1, 3]].any()
        assert not shard.layers[0].any()


@pytest.mark.parametrize(("num_kv_heads", "size"), CASES)
def test_what_the_ranks_hold_is_read_as_one_cache_would_give_it(num_kv_heads: int, size: int) -> None:
    whole = make_whole(num_kv_heads)
    sharded, shards = make_sharded(num_kv_heads, size)
    for rank, shard in enumerate(shards):
        heads = Shard(rank, size).kv_heads(num_kv_heads)
        for ours, theirs in zip(shard.layers, whole.layers, strict=True):
            ours.copy_(theirs[:, :, heads.start : heads.stop])
    for block_ids in ([3], [4, 0, 2]):
        found = sharded.read_blocks(1, block_ids)
        assert bytes(found) == bytes(whole.read_blocks(1, block_ids))
        assert len(found) == len(block_ids) * whole.spec.layer_block_bytes


def test_blocks_go_from_any_number_of_ranks_to_any_other() -> None:
    whole = make_whole(num_kv_heads=2)
    payload = whole.read_blocks(0, [1, 4])
    for sizes in ((1, 2), (2, 1), (2, 4), (4, 2)):
        caches = [make_sharded(2, size)[0] for size in sizes]
        caches[0].write_blocks(0, [0, 3], payload)
        caches[1].write_blocks(0, [2, 1], caches[0].read_blocks(0, [0, 3]))
        assert bytes(caches[1].read_blocks(0, [2, 1])) == bytes(payload)


def test_a_payload_of_another_length_is_a_bug() -> None:
    sharded, _ = make_sharded(2, 2)
    with pytest.raises(InvariantError):
        sharded.write_blocks(0, [0], b"123")


def test_a_storage_in_given_memory_lies_there_layer_after_layer() -> None:
    spec = make_spec(dtype="bfloat16")
    memory = torch.zeros(PagedStorage.bytes_of(spec, NUM_BLOCKS), dtype=torch.uint8)
    storage, elsewhere = PagedStorage(spec, NUM_BLOCKS, memory=memory), PagedStorage(spec, NUM_BLOCKS)
    for each in (storage, elsewhere):
        fill_with_noise(each, seed=3)
    expected = b"".join(bytes(elsewhere.read_blocks(layer, range(NUM_BLOCKS))) for layer in range(spec.num_layers))
    assert memory.numpy().tobytes() == expected
