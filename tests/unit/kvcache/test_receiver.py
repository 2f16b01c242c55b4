"""A handoff moves exactly the bytes it says to where they belong, or is refused and leaves nothing behind.

After every test here both caches are idle, whatever went wrong: see the fixture.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcache.errors import TransferError, TransferFault
from kvcache.lease import LeaseState
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.wire import ChunkRange
from tests.unit.kvcache.handoff import (
    BYSTANDER,
    FIRST_TOKEN_ID,
    LEASE_TTL_S,
    NUM_CACHED_TOKENS,
    NUM_TOKENS,
    REQUEST_ID,
    SPEC,
    Handoff,
)

UINT32_MAX = 2**32 - 1
LAYER_BLOCK = bytes(SPEC.layer_block_bytes)
Damage = Callable[[Handoff], None]


def check_refused(handoff: Handoff, fault: TransferFault, mention: str | None = None) -> None:
    """The handoff fails as said, no sequence gets the KV, no lease is left, and the others' KV is untouched."""
    with pytest.raises(TransferError, match=mention) as caught:
        handoff.deliver()
    assert caught.value.fault is fault
    assert handoff.target_lease.state is LeaseState.ABORTED
    assert len(handoff.target.manager.leases) == 0
    assert handoff.target.read(BYSTANDER) == handoff.bystander_before
    with pytest.raises(TransferError):  # nor can it be finished afterwards
        handoff.deliver()


def flip_payload_bit(index: int) -> Damage:
    def damage(handoff: Handoff) -> None:
        payload = bytearray(handoff.chunks[1].payload)
        payload[index] ^= 0x10
        handoff.chunks[1].payload = bytes(payload)

    return damage


def flip_number(field: str, bit: int = 0) -> Damage:
    def damage(handoff: Handoff) -> None:
        chunk = handoff.chunks[0]
        setattr(chunk, field, getattr(chunk, field) ^ (1 << bit))

    return damage


def rename_transfer(handoff: Handoff) -> None:
    handoff.chunks[0].transfer_id = "uransfer"


def resize_payload(num_bytes: int) -> Damage:
    def damage(handoff: Handoff) -> None:
        chunk = handoff.chunks[0]
        chunk.payload = (bytes(chunk.payload) + LAYER_BLOCK * 2)[:num_bytes]

    return damage


def repeat_chunk(handoff: Handoff) -> None:
    handoff.messages.insert(2, handoff.messages[1])


def cut_again_with_overlap(handoff: Handoff) -> None:
    """Blocks 1 and 2 after blocks 0 and 1, each chunk right in itself."""
    handoff.messages[2] = handoff.make_chunk(1, ChunkRange(0, 1, 2), LAYER_BLOCK * 2)


def cut_again_with_overlapping_layers(handoff: Handoff) -> None:
    """Layers 0 and 1 after layer 0, each chunk right in itself."""
    handoff.messages[2] = handoff.make_chunk(1, ChunkRange(0, 0, 2, 2), LAYER_BLOCK * 4)


def replace_chunk(layer: int, first_block: int, num_blocks: int, num_layers: int = 1) -> Damage:
    def damage(handoff: Handoff) -> None:
        where = ChunkRange(layer, first_block, num_blocks, num_layers)
        handoff.messages[1] = handoff.make_chunk(0, where, LAYER_BLOCK)

    return damage


def drop_chunk(handoff: Handoff) -> None:
    del handoff.messages[2]


def drop_chunk_and_count_without_it(handoff: Handoff) -> None:
    del handoff.messages[2]
    handoff.commit.num_chunks -= 1


def drop_last_chunk(handoff: Handoff) -> None:
    del handoff.messages[-2]


def drop_last_chunk_and_count_without_it(handoff: Handoff) -> None:
    drop_last_chunk(handoff)
    handoff.commit.num_chunks -= 1


def swap_chunks(handoff: Handoff) -> None:
    handoff.messages[1:3] = handoff.messages[2:0:-1]


def miscount(difference: int) -> Damage:
    def damage(handoff: Handoff) -> None:
        handoff.commit.num_chunks += difference

    return damage


def change_first_token(handoff: Handoff) -> None:
    handoff.commit.first_token_id ^= 1


def change_cached_tokens(handoff: Handoff) -> None:
    handoff.commit.num_cached_tokens ^= 1


def change_epoch(which: int) -> Damage:
    def damage(handoff: Handoff) -> None:
        handoff.messages[which].epoch += 1

    return damage


DAMAGES: dict[str, tuple[Damage, TransferFault]] = {
    "first payload byte": (flip_payload_bit(0), TransferFault.BAD_CHECKSUM),
    "last payload byte": (flip_payload_bit(-1), TransferFault.BAD_CHECKSUM),
    "checksum": (flip_number("checksum", bit=63), TransferFault.BAD_CHECKSUM),
    "layer of another chunk": (flip_number("layer"), TransferFault.BAD_CHECKSUM),
    "first block of another chunk": (flip_number("first_block"), TransferFault.BAD_CHECKSUM),
    "number of blocks": (flip_number("num_blocks"), TransferFault.BAD_LENGTH),
    "first token": (change_first_token, TransferFault.BAD_CHECKSUM),
    "cached tokens": (change_cached_tokens, TransferFault.BAD_CHECKSUM),
    "epoch": (flip_number("epoch", bit=63), TransferFault.STALE_EPOCH),
    "transfer id": (rename_transfer, TransferFault.UNKNOWN_TRANSFER),
    "truncated by a byte": (resize_payload(2 * len(LAYER_BLOCK) - 1), TransferFault.BAD_LENGTH),
    "truncated by a block": (resize_payload(len(LAYER_BLOCK)), TransferFault.BAD_LENGTH),
    "without payload": (resize_payload(0), TransferFault.BAD_LENGTH),
    "oversized by a byte": (resize_payload(2 * len(LAYER_BLOCK) + 1), TransferFault.BAD_LENGTH),
    "repeated chunk": (repeat_chunk, TransferFault.REPEATED),
    "overlapping layers": (cut_again_with_overlapping_layers, TransferFault.REPEATED),
    "overlapping chunk": (cut_again_with_overlap, TransferFault.REPEATED),
    "layer past the last": (replace_chunk(SPEC.num_layers, 0, 1), TransferFault.OUT_OF_BOUNDS),
    "number of layers": (flip_number("num_layers", bit=1), TransferFault.OUT_OF_BOUNDS),
    "layers past the last": (replace_chunk(1, 0, 1, 2), TransferFault.OUT_OF_BOUNDS),
    "huge number of layers": (replace_chunk(0, 0, 1, UINT32_MAX), TransferFault.OUT_OF_BOUNDS),
    "layers that would wrap in 32 bits": (replace_chunk(UINT32_MAX, 0, 1, 2), TransferFault.OUT_OF_BOUNDS),
    "no layers": (replace_chunk(0, 0, 1, 0), TransferFault.OUT_OF_BOUNDS),
    "a layer less than is said": (replace_chunk(0, 0, 1, 2), TransferFault.BAD_LENGTH),
    "huge layer": (replace_chunk(UINT32_MAX, 0, 1), TransferFault.OUT_OF_BOUNDS),
    "block past the last": (replace_chunk(0, 3, 1), TransferFault.OUT_OF_BOUNDS),
    "huge first block": (replace_chunk(0, UINT32_MAX, 1), TransferFault.OUT_OF_BOUNDS),
    "range past the last block": (replace_chunk(0, 2, 2), TransferFault.OUT_OF_BOUNDS),
    "huge number of blocks": (replace_chunk(0, 0, UINT32_MAX), TransferFault.OUT_OF_BOUNDS),
    "range that would wrap in 32 bits": (replace_chunk(0, UINT32_MAX, 2), TransferFault.OUT_OF_BOUNDS),
    "no blocks": (replace_chunk(0, 0, 0), TransferFault.OUT_OF_BOUNDS),
    "index": (flip_number("index"), TransferFault.BAD_CHECKSUM),
    "chunks in another order": (swap_chunks, TransferFault.OUT_OF_ORDER),
    "missing chunk": (drop_chunk, TransferFault.OUT_OF_ORDER),
    "missing chunk, not counted": (drop_chunk_and_count_without_it, TransferFault.OUT_OF_ORDER),
    "missing last chunk": (drop_last_chunk, TransferFault.INCOMPLETE),
    "missing last chunk, not counted": (drop_last_chunk_and_count_without_it, TransferFault.INCOMPLETE),
    "one chunk too many counted": (miscount(1), TransferFault.INCOMPLETE),
    "one chunk too few counted": (miscount(-1), TransferFault.INCOMPLETE),
    "epoch of the opening": (change_epoch(0), TransferFault.STALE_EPOCH),
    "epoch of the commit": (change_epoch(-1), TransferFault.STALE_EPOCH),
}


def test_a_handoff_moves_the_exact_bytes_to_differently_numbered_blocks(handoff: Handoff) -> None:
    assert handoff.source_lease.block_ids != handoff.target_lease.block_ids
    received = handoff.deliver()
    assert handoff.target.read(REQUEST_ID) == handoff.expected
    assert handoff.target.read(BYSTANDER) == handoff.bystander_before
    assert (received.request_id, received.first_token_id) == (REQUEST_ID, FIRST_TOKEN_ID)
    assert received.num_cached_tokens == NUM_CACHED_TOKENS
    assert received.payload_bytes == sum(map(len, handoff.expected))
    assert (handoff.target_lease.state, len(handoff.target.manager.leases)) == (LeaseState.COMMITTED, 0)


def test_the_sender_makes_chunks_of_a_layers_part_and_of_several_layers(handoff: Handoff) -> None:
    """Without this the tests of lost and reordered chunks would prove little."""
    assert [chunk.where for chunk in handoff.chunks] == [
        ChunkRange(0, 0, 2),
        ChunkRange(1, 0, 2),
        ChunkRange(0, 2, 1, num_layers=2),
    ]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_handoff_is_refused_and_leaves_nothing_behind(handoff: Handoff, name: str) -> None:
    damage, fault = DAMAGES[name]
    damage(handoff)
    check_refused(handoff, fault)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 3),
        ("num_kv_heads", 4),
        ("head_size", 128),
        ("num_layers", 0),
        ("block_size", 0),
        ("dtype", "pickle"),
    ],
)
def test_an_incompatible_cache_is_refused_by_the_name_of_its_field(handoff: Handoff, field: str, value: object) -> None:
    setattr(handoff.opening.spec, field, value)
    check_refused(handoff, TransferFault.INCOMPATIBLE, mention=field)


@pytest.mark.parametrize("num_blocks", [0, 2, 4, UINT32_MAX])
def test_an_opening_for_another_number_of_blocks_is_refused(handoff: Handoff, num_blocks: int) -> None:
    handoff.opening.num_blocks = num_blocks
    check_refused(handoff, TransferFault.INCOMPATIBLE, mention="num_blocks is 3 here")


def test_an_opening_for_an_unknown_transfer_is_refused(handoff: Handoff) -> None:
    handoff.opening.transfer_id = "another"
    check_refused(handoff, TransferFault.UNKNOWN_TRANSFER)


@pytest.mark.parametrize("kind", ["chunk", "commit"])
def test_a_message_of_another_open_transfer_is_refused(handoff: Handoff, kind: str) -> None:
    leases = handoff.target.manager.leases
    other = leases.open("other", BYSTANDER, handoff.target.manager.block_table(BYSTANDER), now=0.0)
    incoming = handoff.receive()
    handoff.chunks[0].transfer_id = handoff.commit.transfer_id = "other"
    with pytest.raises(TransferError, match="not this stream's") as caught:
        handoff.feed(incoming, kind)
    assert caught.value.fault is TransferFault.UNKNOWN_TRANSFER
    assert (other.state, handoff.target.read(BYSTANDER)) == (LeaseState.RESERVED, handoff.bystander_before)
    leases.abort(other)


def test_a_second_opening_is_refused_and_does_not_disturb_the_first(handoff: Handoff) -> None:
    first = handoff.receive()
    with pytest.raises(TransferError) as caught:
        handoff.receive()
    assert caught.value.fault is TransferFault.REPEATED
    for chunk in handoff.chunks:
        first.write(chunk, now=0.0)
    first.commit(handoff.commit, now=0.0)
    assert handoff.target.read(REQUEST_ID) == handoff.expected


def test_a_refused_opening_changes_nothing(handoff: Handoff) -> None:
    wrong = pb.TransferOpen.FromString(handoff.opening.SerializeToString())
    wrong.spec.num_layers += 1
    right = handoff.messages[0]
    handoff.messages[0] = wrong
    with pytest.raises(TransferError):
        handoff.receive(now=1.0)
    assert (handoff.target_lease.state, handoff.target_lease.expires_at_s) == (LeaseState.RESERVED, LEASE_TTL_S)
    handoff.messages[0] = right
    handoff.deliver()
    assert handoff.target.read(REQUEST_ID) == handoff.expected


def test_a_refused_chunk_is_not_written(handoff: Handoff) -> None:
    before = handoff.target.read(REQUEST_ID)
    incoming = handoff.receive()
    flip_payload_bit(0)(handoff)
    with pytest.raises(TransferError):
        incoming.write(handoff.chunks[1], now=0.0)
    assert handoff.target.read(REQUEST_ID) == before


@pytest.mark.parametrize("kind", ["chunk", "commit"])
def test_after_an_abort_every_message_is_refused(handoff: Handoff, kind: str) -> None:
    """The zombie of F6: the blocks may belong to another sequence by now, and stay as they are."""
    incoming = handoff.receive()
    for chunk in handoff.chunks:
        if kind == "commit":
            incoming.write(chunk, now=0.0)
    handoff.target.manager.leases.abort(handoff.target_lease)
    handoff.target.manager.free(REQUEST_ID)
    handoff.target.manager.extend("next", SPEC.block_size * 4)
    next_before = handoff.target.read("next")
    with pytest.raises(TransferError) as caught:
        handoff.feed(incoming, kind)
    assert caught.value.fault is TransferFault.STALE_EPOCH
    assert handoff.target.read("next") == next_before
    handoff.target.manager.free("next")


def test_after_its_lease_has_run_out_an_opening_is_refused(handoff: Handoff) -> None:
    with pytest.raises(TransferError) as caught:
        handoff.receive(now=LEASE_TTL_S)
    assert caught.value.fault is TransferFault.EXPIRED


@pytest.mark.parametrize("kind", ["chunk", "commit"])
def test_after_its_lease_has_run_out_every_message_is_refused(handoff: Handoff, kind: str) -> None:
    incoming = handoff.receive()
    for chunk in handoff.chunks:
        if kind == "commit":
            incoming.write(chunk, now=0.0)
    before = handoff.target.read(REQUEST_ID)
    with pytest.raises(TransferError) as caught:
        handoff.feed(incoming, kind, now=LEASE_TTL_S)
    assert caught.value.fault is TransferFault.EXPIRED
    assert handoff.target.read(REQUEST_ID) == before


def test_every_verified_chunk_gives_the_lease_a_full_term(handoff: Handoff) -> None:
    incoming = handoff.receive(now=1.0)
    assert handoff.target_lease.expires_at_s == 1.0 + LEASE_TTL_S
    for now, chunk in zip([9.0, 17.0, 25.0], handoff.chunks, strict=True):
        incoming.write(chunk, now)
        assert handoff.target_lease.expires_at_s == now + LEASE_TTL_S
    incoming.commit(handoff.commit, now=33.0)
    assert handoff.target.read(REQUEST_ID) == handoff.expected


def test_a_refused_chunk_does_not_prolong_the_lease(handoff: Handoff) -> None:
    incoming = handoff.receive(now=0.0)
    flip_payload_bit(0)(handoff)
    with pytest.raises(TransferError):
        incoming.write(handoff.chunks[1], now=5.0)
    assert handoff.target_lease.expires_at_s == LEASE_TTL_S


# A prefix that the decode side holds already is not sent. Three blocks, of which it holds the first.


def test_only_the_blocks_that_the_receiver_lacks_are_sent(partial_handoff: Handoff) -> None:
    before = partial_handoff.target.read(REQUEST_ID)
    received = partial_handoff.deliver()
    ranges = [(chunk.layer, chunk.first_block, chunk.num_blocks) for chunk in partial_handoff.chunks]
    assert ranges == [(0, 1, 2), (1, 1, 2)]
    size = SPEC.layer_block_bytes
    held = [layer[:size] for layer in before]
    sent = [layer[size:] for layer in partial_handoff.expected]
    assert partial_handoff.target.read(REQUEST_ID) == [one + other for one, other in zip(held, sent, strict=True)]
    assert received.payload_bytes == sum(map(len, sent))
    assert partial_handoff.target.read(BYSTANDER) == partial_handoff.bystander_before


PARTIAL_DAMAGES: dict[str, tuple[ChunkRange, TransferFault]] = {
    "held block": (ChunkRange(0, 0, 1), TransferFault.OUT_OF_BOUNDS),
    "range that begins in it": (ChunkRange(0, 0, 2), TransferFault.OUT_OF_BOUNDS),
    "the whole prompt": (ChunkRange(0, 0, 3), TransferFault.OUT_OF_BOUNDS),
    "range past the last block": (ChunkRange(0, 2, 2), TransferFault.OUT_OF_BOUNDS),
    "block past the last": (ChunkRange(0, 3, 1), TransferFault.OUT_OF_BOUNDS),
    "a part of the missing ones": (ChunkRange(0, 1, 1), TransferFault.INCOMPLETE),
}


@pytest.mark.parametrize("name", PARTIAL_DAMAGES)
def test_a_chunk_beside_the_missing_blocks_is_refused_and_touches_none_that_is_held(
    partial_handoff: Handoff, name: str
) -> None:
    where, fault = PARTIAL_DAMAGES[name]
    held = [layer[: SPEC.layer_block_bytes] for layer in partial_handoff.target.read(REQUEST_ID)]
    partial_handoff.messages[1] = partial_handoff.make_chunk(0, where, LAYER_BLOCK * where.num_blocks)
    check_refused(partial_handoff, fault)
    assert [layer[: SPEC.layer_block_bytes] for layer in partial_handoff.target.read(REQUEST_ID)] == held


@pytest.mark.parametrize("first_block", [0, 2, UINT32_MAX])
def test_an_opening_from_another_first_block_is_refused(partial_handoff: Handoff, first_block: int) -> None:
    partial_handoff.opening.first_block = first_block
    check_refused(partial_handoff, TransferFault.INCOMPATIBLE, mention="first_block is 1 here")


def test_a_held_block_may_be_shared_while_the_rest_is_received(partial_handoff: Handoff) -> None:
    """The lease protects what is written; who else reads the prefix does not matter."""
    manager = partial_handoff.target.manager
    (held, *_) = manager.block_table(REQUEST_ID)
    assert held not in partial_handoff.target_lease.block_ids
    assert manager.pool.references(held) == 1


def test_the_lease_knows_how_much_of_the_prompt_is_there_in_all_layers(handoff: Handoff) -> None:
    incoming = handoff.receive()
    verified = []
    for chunk in handoff.chunks:
        incoming.write(chunk, 0.0)
        verified.append(handoff.target_lease.num_verified_tokens)
    assert verified == [0, 2 * SPEC.block_size, NUM_TOKENS]


def test_blocks_behind_a_gap_do_not_count_until_it_is_filled(handoff: Handoff) -> None:
    incoming = handoff.receive()
    early, late = [chunk for chunk in handoff.chunks if not chunk.first_block], handoff.chunks[2:]
    verified = []
    for index, chunk in enumerate((*late, *early)):
        incoming.write(handoff.make_chunk(index, chunk.where, chunk.payload), 0.0)
        verified.append(handoff.target_lease.num_verified_tokens)
    assert verified == [0, 0, NUM_TOKENS]


def test_nothing_is_kept_of_a_sender_that_breaks_the_protocol(handoff: Handoff) -> None:
    incoming = handoff.receive()
    for chunk in handoff.chunks:
        incoming.write(chunk, 0.0)
    incoming.distrust()
    assert handoff.target_lease.num_verified_tokens == 0
