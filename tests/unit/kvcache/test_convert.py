"""Between caches of different blocks and dtypes: each token's row arrives where it belongs, and nothing else does."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcache.errors import TransferError, TransferFault
from kvcache.manager import KVCacheManager
from kvcache.rows import decode_rows, encode_rows
from kvcache.spec import CACHE_DTYPES, KVCacheSpec
from kvcache.storage import PagedStorage
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.receiver import IncomingTransfer
from kvcache.transfer.sender import OutgoingTransfer, PrefillOutcome, TransferTarget
from kvcache.transfer.wire import Chunk, Message
from tests.builders import make_spec, repeatable

BLOCK_SIZES = (8, 16, 32, 64, 128)
NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE = 2, 2, 4


class End:
    """One worker's cache with one sequence in it, whose blocks are in no order."""

    def __init__(self, spec: KVCacheSpec, num_tokens: int, seed: int) -> None:
        self.spec = spec
        num_blocks = spec.num_blocks_for(num_tokens) + 3
        self.manager = KVCacheManager(spec, num_blocks)
        self.storage = PagedStorage(spec, num_blocks)
        generator = torch.Generator().manual_seed(seed)
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_size)
        for layer in self.storage.layers:  # what earlier owners left
            layer.copy_(encode_rows(torch.randn(shape, generator=generator), layer.dtype))
        blocks = list(range(num_blocks))
        random.Random(seed).shuffle(blocks)
        self.table = blocks[: spec.num_blocks_for(num_tokens)]
        self.manager.extend("all", num_blocks * spec.block_size)

    def row(self, layer: int, part: int, head: int, token: int) -> torch.Tensor:
        """The slow way to one token in one head."""
        block = self.table[token // self.spec.block_size]
        return self.storage.layers[layer][block, part, head, token % self.spec.block_size].clone()


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
    incoming = IncomingTransfer(target.manager, target.storage, opening, now=0.0)
    for chunk in chunks:
        incoming.write(chunk, now=0.0)
    incoming.commit(commit, now=0.0)


def check_rows(source: End, target: End, num_tokens: int, held_blocks: int, before: list[torch.Tensor]) -> None:
    """Against every row by itself."""
    held_tokens = held_blocks * target.spec.block_size
    dtype = target.storage.layers[0].dtype
    same = source.spec.dtype == target.spec.dtype
    for layer in range(NUM_LAYERS):
        for part in range(2):
            for head in range(NUM_KV_HEADS):
                for token in range(held_tokens, num_tokens):
                    row = source.row(layer, part, head, token)
                    expected = row if same else encode_rows(decode_rows(row, torch.float32), dtype)
                    found = target.row(layer, part, head, token)
                    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), (layer, token)
        untouched = [block for block in range(target.storage.num_blocks) if block not in target.table[held_blocks:]]
        assert torch.equal(target.storage.layers[layer][untouched], before[layer][untouched])


def check_handover(
    source_spec: KVCacheSpec,
    target_spec: KVCacheSpec,
    num_tokens: int,
    held_blocks: int = 0,
    *,
    shuffled: bool = False,
    chunk_bytes: int = 1 << 20,
) -> End:
    source, target = End(source_spec, num_tokens, seed=1), End(target_spec, num_tokens, seed=2)
    before = [layer.clone() for layer in target.storage.layers]
    hand_over(source, target, num_tokens, held_blocks, shuffled=shuffled, chunk_bytes=chunk_bytes)
    check_rows(source, target, num_tokens, held_blocks, before)
    return target


def spec_of(block_size: int, dtype: str = "float32") -> KVCacheSpec:
    return make_spec(NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE, block_size, dtype)


@pytest.mark.parametrize("target", BLOCK_SIZES)
@pytest.mark.parametrize("source", BLOCK_SIZES)
def test_every_pair_of_block_sizes(source: int, target: int) -> None:
    for num_tokens in (1, 8, 70, 129):
        check_handover(spec_of(source), spec_of(target), num_tokens)


@pytest.mark.parametrize("target", CACHE_DTYPES)
@pytest.mark.parametrize("source", CACHE_DTYPES)
def test_every_pair_of_dtypes(source: str, target: str) -> None:
    check_handover(spec_of(16, source), spec_of(16, target), 37)
    check_handover(spec_of(8, source), spec_of(32, target), 37)


@given(
    source=st.sampled_from([1, 3, 8, 16, 32, 64]),
    target=st.sampled_from([1, 3, 8, 16, 32, 64]),
    num_tokens=st.integers(1, 90),
    held=st.floats(0, 1, exclude_max=True),
    shuffled=st.booleans(),
    chunk_bytes=st.integers(0, 4000),
)
@repeatable(150)
def test_what_the_receiver_holds_is_never_written_and_chunks_may_come_in_any_order(
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
    for layer in sender.storage.layers:
        layer[sender.table[-1], :, :, num_tokens % source :] = 0
    hand_over(sender, receiver, num_tokens, 0, shuffled=False, chunk_bytes=1 << 20)
    for layer in receiver.storage.layers:
        assert not layer[receiver.table[-1], :, :, num_tokens % target or target :].any()


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"num_kv_heads": 1}, {"head_size": 8}])
def test_what_cannot_be_converted_is_refused_by_the_name_of_its_field(change: dict[str, int]) -> None:
    source = End(replace(spec_of(16), **change), 20, seed=1)
    target = End(spec_of(16), 20, seed=2)
    with pytest.raises(TransferError, match=next(iter(change))) as caught:
        hand_over(source, target, 20, 0, shuffled=False, chunk_bytes=1 << 20)
    assert caught.value.fault is TransferFault.INCOMPATIBLE
