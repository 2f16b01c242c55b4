"""Between caches of different blocks, dtypes and ranks: each token's row arrives where it belongs, and nothing else."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache.errors import TransferError, TransferFault
from kvcache.heads import Shard
from kvcache.manager import KVCacheManager
from kvcache.rows import decode_rows, encode_rows
from kvcache.sharded_storage import ShardedStorage
from kvcache.spec import CACHE_DTYPES, KVCacheSpec
from kvcache.storage import BlockStorage, PagedStorage
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.receiver import IncomingTransfer
from kvcache.transfer.sender import OutgoingTransfer, PrefillOutcome, TransferTarget
from kvcache.transfer.wire import Chunk, Message, make_chunk
from tests.builders import make_spec, repeatable

BLOCK_SIZES = (8, 16, 32, 64, 128)
NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE = 2, 2, 4
NUM_RANKS = (1, 2, 4)
BLOCK_PAIRS = tuple(itertools.product(BLOCK_SIZES, repeat=2))
DTYPE_PAIRS = tuple(itertools.product(CACHE_DTYPES, repeat=2))
RANK_PAIRS = tuple(itertools.product(NUM_RANKS, repeat=2))
HEADS_AND_RANKS = tuple(itertools.product((2, 4), RANK_PAIRS))  # two heads on four ranks: each is there twice


class End:
    """One worker's cache with one sequence in it, whose blocks are in no order."""

    def __init__(self, spec: KVCacheSpec, num_tokens: int, seed: int, num_ranks: int = 1) -> None:
        self.spec = spec
        num_blocks = spec.num_blocks_for(num_tokens) + 3
        self.manager = KVCacheManager(spec, num_blocks)
        self.shards = [PagedStorage(Shard(rank, num_ranks).of_spec(spec), num_blocks) for rank in range(num_ranks)]
        self.heads = [Shard(rank, num_ranks).kv_heads(spec.num_kv_heads) for rank in range(num_ranks)]
        self.storage: BlockStorage = self.shards[0] if num_ranks == 1 else ShardedStorage(spec, self.shards)
        generator = torch.Generator().manual_seed(seed)
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_size)
        for layer in range(spec.num_layers):  # what earlier owners left
            noise = torch.randn(shape, generator=generator)
            for shard, heads in zip(self.shards, self.heads, strict=True):
                own = shard.layers[layer]
                own.copy_(encode_rows(noise[:, :, heads.start : heads.stop], own.dtype))
        blocks = list(range(num_blocks))
        random.Random(seed).shuffle(blocks)
        self.table = blocks[: spec.num_blocks_for(num_tokens)]
        self.manager.extend("all", num_blocks * spec.block_size)

    def rows(self, layer: int, part: int, head: int, token: int) -> list[torch.Tensor]:
        """The slow way to one token in one head, on every rank that holds it."""
        block = self.table[token // self.spec.block_size]
        return [
            shard.layers[layer][block, part, head - heads.start, token % self.spec.block_size].clone()
            for shard, heads in zip(self.shards, self.heads, strict=True)
            if head in heads
        ]

    def content(self) -> list[torch.Tensor]:
        """Of all blocks: a copy, rank by rank and layer by layer."""
        return [layer.clone() for shard in self.shards for layer in shard.layers]


def hand_over(source: End, target: End, num_tokens: int, held_blocks: int, *, shuffled: bool, chunk_bytes: int) -> None:
    held_tokens = held_blocks * target.spec.block_size
    first_block = held_tokens // source.spec.block_size
    ours = source.manager.leases.open("t", "a", source.table[first_block:], 0.0, first_block=first_block)
    target.manager.leases.open(
        "t", "a", target.table[held_blocks:], 0.0, first_block=held_blocks, num_tokens=num_tokens
    )
    outgoing = OutgoingTransfer(source.storage, ours, TransferTarget("nowhere:1", "t", 1, held_tokens), chunk_bytes)
    outgoing.complete(PrefillOutcome(7))
    messages: list[Message] = []
    while (message := outgoing.next_message()) is not None:
        messages.append(message)
    opening, commit = messages[0], messages[-1]
    chunks = [message for message in messages if isinstance(message, Chunk)]
    assert isinstance(opening, pb.TransferOpen) and isinstance(commit, pb.TransferCommit)
    if shuffled:
        random.Random(num_tokens).shuffle(chunks)
        chunks = [make_chunk("t", 1, index, each.where, each.payload) for index, each in enumerate(chunks)]
    incoming = IncomingTransfer(target.manager, target.storage, opening, now=0.0)
    for chunk in chunks:
        incoming.write(chunk, now=0.0)
    incoming.commit(commit, now=0.0)


def check_rows(source: End, target: End, num_tokens: int, held_blocks: int, before: list[torch.Tensor]) -> None:
    """Against every row by itself."""
    held_tokens = held_blocks * target.spec.block_size
    dtype = target.shards[0].layers[0].dtype
    same = source.spec.dtype == target.spec.dtype
    spec = source.spec
    for layer, part, head in itertools.product(range(spec.num_layers), range(2), range(spec.num_kv_heads)):
        for token in range(held_tokens, num_tokens):
            row = source.rows(layer, part, head, token)[0]
            expected = row if same else encode_rows(decode_rows(row, torch.float32), dtype)
            for found in target.rows(layer, part, head, token):
                assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), (layer, token)
    untouched = [block for block in range(target.storage.num_blocks) if block not in target.table[held_blocks:]]
    for now, then in zip(target.content(), before, strict=True):
        assert torch.equal(now[untouched], then[untouched])


def check_handover(
    source_spec: KVCacheSpec,
    target_spec: KVCacheSpec,
    num_tokens: int,
    held_blocks: int = 0,
    *,
    num_ranks: tuple[int, int] = (1, 1),
    shuffled: bool = False,
    chunk_bytes: int = 1 << 20,
) -> None:
    source = End(source_spec, num_tokens, seed=1, num_ranks=num_ranks[0])
    target = End(target_spec, num_tokens, seed=2, num_ranks=num_ranks[1])
    before = target.content()
    hand_over(source, target, num_tokens, held_blocks, shuffled=shuffled, chunk_bytes=chunk_bytes)
    check_rows(source, target, num_tokens, held_blocks, before)


def spec_of(
    block_size: int, dtype: str = "float32", num_kv_heads: int = NUM_KV_HEADS, num_layers: int = NUM_LAYERS
) -> KVCacheSpec:
    return make_spec(num_layers, num_kv_heads, HEAD_SIZE, block_size, dtype)


@pytest.mark.parametrize("target", BLOCK_SIZES)
@pytest.mark.parametrize("source", BLOCK_SIZES)
def test_every_pair_of_block_sizes(source: int, target: int) -> None:
    for num_tokens in (1, 8, 70, 129):
        check_handover(spec_of(source), spec_of(target), num_tokens)


@pytest.mark.parametrize("index", range(len(DTYPE_PAIRS)), ids=[f"{ours}-{theirs}" for ours, theirs in DTYPE_PAIRS])
def test_every_pair_of_dtypes_with_every_pair_of_block_sizes_over_ranks_in_turn(index: int) -> None:
    """Each of these 625 cases has the next of the 18 choices of heads and ranks. 25 is more than 18, and has no divisor
    in common with it: so each choice meets every pair of dtypes, and every pair of block sizes."""
    source_dtype, target_dtype = DTYPE_PAIRS[index]
    for number, (source, target) in enumerate(BLOCK_PAIRS, start=index * len(BLOCK_PAIRS)):
        num_kv_heads, num_ranks = HEADS_AND_RANKS[number % len(HEADS_AND_RANKS)]
        check_handover(
            spec_of(source, source_dtype, num_kv_heads, num_layers=1),
            spec_of(target, target_dtype, num_kv_heads, num_layers=1),
            num_tokens=18,
            num_ranks=num_ranks,
        )


@given(
    blocks=st.sampled_from(BLOCK_PAIRS),
    dtypes=st.sampled_from(DTYPE_PAIRS),
    heads_and_ranks=st.sampled_from(HEADS_AND_RANKS),
    num_tokens=st.integers(1, 100),
    held=st.floats(0, 1, exclude_max=True),
    chunk_bytes=st.integers(0, 4000),
)
@repeatable(30)
def test_any_blocks_with_any_dtypes_and_any_ranks(
    blocks: tuple[int, int],
    dtypes: tuple[str, str],
    heads_and_ranks: tuple[int, tuple[int, int]],
    num_tokens: int,
    held: float,
    chunk_bytes: int,
) -> None:
    num_kv_heads, num_ranks = heads_and_ranks
    check_handover(
        spec_of(blocks[0], dtypes[0], num_kv_heads),
        spec_of(blocks[1], dtypes[1], num_kv_heads),
        num_tokens,
        int(held * (num_tokens - 1) / blocks[1]),
        num_ranks=num_ranks,
        shuffled=True,
        chunk_bytes=chunk_bytes,
    )


@given(
    source=st.sampled_from([1, 3, 8, 16, 32, 64]),
    target=st.sampled_from([1, 3, 8, 16, 32, 64]),
    num_tokens=st.integers(1, 90),
    held=st.floats(0, 1, exclude_max=True),
    shuffled=st.booleans(),
    chunk_bytes=st.integers(0, 4000),
)
@repeatable(150)
def test_what_the_receiver_holds_is_never_written_and_a_sender_may_choose_any_order(
    source: int, target: int, num_tokens: int, held: float, shuffled: bool, chunk_bytes: int
) -> None:
    held_blocks = int(held * (num_tokens - 1) / target)  # full blocks, and never the whole prompt
    check_handover(
        spec_of(source), spec_of(target), num_tokens, held_blocks, shuffled=shuffled, chunk_bytes=chunk_bytes
    )


@pytest.mark.parametrize(("source", "target"), [(8, 32), (32, 8), (128, 16)])
def test_nothing_of_an_earlier_owner_stays_in_the_last_block(source: int, target: int) -> None:
    """The sender's last block is zeros beyond the prompt, as both levels of the model leave it."""
    num_tokens = 37
    sender, receiver = End(spec_of(source), num_tokens, seed=1), End(spec_of(target), num_tokens, seed=2)
    for layer in sender.shards[0].layers:
        layer[sender.table[-1], :, :, num_tokens % source :] = 0
    hand_over(sender, receiver, num_tokens, 0, shuffled=False, chunk_bytes=1 << 20)
    for layer in receiver.shards[0].layers:
        assert not layer[receiver.table[-1], :, :, num_tokens % target or target :].any()


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"num_kv_heads": 1}, {"head_size": 8}])
def test_what_cannot_be_converted_is_refused_by_the_name_of_its_field(change: dict[str, int]) -> None:
    source = End(replace(spec_of(16), **change), 20, seed=1)
    target = End(spec_of(16), 20, seed=2)
    with pytest.raises(TransferError, match=next(iter(change))) as caught:
        hand_over(source, target, 20, 0, shuffled=False, chunk_bytes=1 << 20)
    assert caught.value.fault is TransferFault.INCOMPATIBLE
