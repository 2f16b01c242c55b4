"""KV of a rank that the leader cannot map: asked for over a socket, it is what mapped memory would be."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kvcache.errors import InvariantError
from kvcache.heads import Shard
from kvcache.sharded_storage import ShardedStorage
from kvcache.storage import BlockStorage, PagedStorage
from tests.builders import fill_with_noise, make_spec
from workers.parallel.channel import Channel, LossWatch
from workers.parallel.kv_shares import RemoteShard, serve_blocks
from workers.parallel.rank import RankLostError

pytestmark = pytest.mark.integration

NUM_BLOCKS = 6


@contextmanager
def served(storage: PagedStorage, lost: list[str] | None = None) -> Iterator[RemoteShard]:
    """``storage`` as another process would see it."""
    ours, theirs = socket.socketpair()
    server = threading.Thread(target=serve_blocks, args=(Channel(theirs), storage), daemon=True)
    server.start()
    channel = Channel(ours)
    try:
        yield RemoteShard(channel, storage.spec, storage.num_blocks, (lost if lost is not None else []).append)
    finally:
        channel.close()
        server.join(10)
        assert not server.is_alive(), "blocks are served after the leader has gone"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_group_s_blocks_are_those_of_one_cache(size: int, dtype: str) -> None:
    """Four ranks hold each of the two KV heads twice. Every rank's storage is written and read through its socket."""
    spec = make_spec(num_kv_heads=2, dtype=dtype)
    whole, back = PagedStorage(spec, NUM_BLOCKS), PagedStorage(spec, NUM_BLOCKS)
    fill_with_noise(whole, 1)
    own = [PagedStorage(Shard(rank, size).of_spec(spec), NUM_BLOCKS) for rank in range(size)]
    with served(own[1]) as second:
        shards: list[BlockStorage] = [own[0], second, *own[2:]]
        group = ShardedStorage(spec, shards)
        for layer in range(spec.num_layers):
            group.write_blocks(layer, [5, 0, 2], whole.read_blocks(layer, [1, 2, 3]))
            memory = bytearray(3 * spec.layer_block_bytes)
            group.read_blocks(layer, [2, 5, 0], memoryview(memory))
            back.write_blocks(layer, [3, 1, 2], memoryview(memory))
            assert torch.equal(back.layers[layer][1:4], whole.layers[layer][1:4])
            heads = Shard(1, size).kv_heads(2)
            expected = whole.layers[layer][[1, 2, 3], :, heads.start : heads.stop]
            assert torch.equal(own[1].layers[layer][[5, 0, 2]], expected), "the rank itself computes with other KV"
            assert not own[1].layers[layer][[1, 3, 4]].any()


def test_blocks_go_into_memory_that_is_given() -> None:
    storage = PagedStorage(make_spec(), NUM_BLOCKS)
    fill_with_noise(storage, 2)
    memory = bytearray(2 * storage.spec.layer_block_bytes)
    with served(storage) as remote:
        assert remote.read_blocks(1, [4, 3], memoryview(memory)).obj is memory
        assert bytes(memory) == bytes(storage.read_blocks(1, [4, 3]))
        assert bytes(remote.read_blocks(1, [4, 3])) == bytes(memory)


def test_a_payload_of_another_length_is_refused_before_it_is_sent() -> None:
    storage = PagedStorage(make_spec(), NUM_BLOCKS)
    with served(storage) as remote:
        with pytest.raises(InvariantError, match="do not fill"):
            remote.write_blocks(0, [1], bytes(storage.spec.layer_block_bytes - 1))
        assert len(remote.read_blocks(0, [1])) == storage.spec.layer_block_bytes, "the socket is out of step"


def test_a_rank_that_cannot_be_asked_ends_its_group() -> None:
    ours, theirs = socket.socketpair()
    lost: list[str] = []
    spec = make_spec()
    channel = Channel(ours)
    channel.set_timeout(0.05)
    remote = RemoteShard(channel, spec, NUM_BLOCKS, lost.append)
    with pytest.raises(RankLostError):
        remote.read_blocks(0, [1])  # silent: a later answer would be taken for that to another question
    theirs.close()
    with pytest.raises(RankLostError):
        remote.write_blocks(0, [1], bytes(spec.layer_block_bytes))
    assert len(lost) == 2 and all("KV of a rank" in reason for reason in lost)
    channel.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_whose_copies_fail_is_lost_at_once() -> None:
    """Its step thread may be well; the leader watches this socket too."""
    storage = PagedStorage(make_spec(), NUM_BLOCKS)
    ours, theirs = socket.socketpair()
    is_lost = threading.Event()
    watch = LossWatch([Channel(ours)], is_lost.set)
    server = threading.Thread(target=serve_blocks, args=(Channel(theirs), storage))
    server.start()
    lost: list[str] = []
    with pytest.raises(RankLostError):
        RemoteShard(Channel(ours), storage.spec, NUM_BLOCKS, lost.append).read_blocks(0, [NUM_BLOCKS])
    assert is_lost.wait(5) and lost
    server.join(5)
    watch.stop()
    ours.close()
