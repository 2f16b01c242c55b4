"""What leaves, and when: never a block that is still being computed, every block once, the commit last."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.errors import TransferError, TransferFault
from kvcache.manager import KVCacheManager
from kvcache.storage import PagedStorage
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.grpc_port import GrpcPort
from kvcache.transfer.port import send_kv
from kvcache.transfer.sender import OutgoingTransfer, PrefillOutcome, TransferTarget
from kvcache.transfer.wire import MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES, Chunk, Message, encode_message
from tests.builders import make_spec, repeatable
from tests.unit.kvcache.handoff import FIRST_TOKEN_ID, NUM_CACHED_TOKENS, REQUEST_ID, SPEC, Handoff

LAYER_BLOCK = bytes(SPEC.layer_block_bytes)


def make_transfer(
    num_layers: int, num_blocks: int, max_chunk_bytes: int = MAX_CHUNK_BYTES, first_block: int = 0
) -> OutgoingTransfer:
    """``num_blocks`` blocks of a prompt, of which the other side holds those before ``first_block``."""
    spec = make_spec(num_layers=num_layers)
    manager = KVCacheManager(spec, max(1, num_blocks))
    manager.extend("a", num_blocks * spec.block_size)
    block_ids = manager.block_table("a")[first_block:]
    lease = manager.leases.open("transfer", "a", block_ids, now=0.0, first_block=first_block)
    manager.leases.start_sending(lease)
    target = TransferTarget("nowhere:1", "transfer", 1, first_block)
    return OutgoingTransfer(PagedStorage(spec, max(1, num_blocks)), lease, target, max_chunk_bytes)


def take_all(transfer: OutgoingTransfer) -> Iterator[Message]:
    while (message := transfer.next_message()) is not None:
        yield message


def cells(chunk: Message) -> list[tuple[int, int]]:
    if not isinstance(chunk, Chunk):
        return []
    layers = range(chunk.layer, chunk.layer + chunk.num_layers)
    return [(layer, chunk.first_block + block) for layer in layers for block in range(chunk.num_blocks)]


STEP = st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(0, 30))  # layers, blocks, messages taken after it


@given(
    steps=st.lists(STEP, max_size=12),
    first_block=st.integers(0, 19),
    num_blocks=st.integers(1, 20),
    max_chunk_bytes=st.integers(0, 2000),
)
@repeatable(200)
def test_a_block_that_is_not_held_leaves_once_and_only_when_it_is_computed(
    steps: list[tuple[int, int, int]], first_block: int, num_blocks: int, max_chunk_bytes: int
) -> None:
    first_block %= num_blocks
    transfer = make_transfer(4, num_blocks, max_chunk_bytes, first_block)
    computed: set[tuple[int, int]] = set()
    sent: Counter[tuple[int, int]] = Counter()

    def take(count: int) -> None:
        for _ in range(count):
            message = transfer.next_message()
            if message is None:
                return
            assert not isinstance(message, pb.TransferCommit)
            sent.update(cells(message))
            if isinstance(message, Chunk):
                assert message.num_layers * message.num_blocks == 1 or len(message.payload) <= max_chunk_bytes
                assert len(message.payload) <= transfer.max_payload_bytes

    for num_layers, blocks, count in steps:
        ready = min(blocks, num_blocks)
        transfer.mark_ready(num_layers, ready)
        computed |= {(layer, block) for layer in range(num_layers) for block in range(first_block, ready)}
        take(count)
        assert set(sent) <= computed
    take(10_000)
    assert set(sent) == computed

    transfer.complete(PrefillOutcome(FIRST_TOKEN_ID, NUM_CACHED_TOKENS))
    *chunks, commit = list(take_all(transfer))
    for message in chunks:
        sent.update(cells(message))
    assert sent == Counter((layer, block) for layer in range(4) for block in range(first_block, num_blocks))
    assert isinstance(commit, pb.TransferCommit)
    assert (commit.first_token_id, commit.num_cached_tokens) == (FIRST_TOKEN_ID, NUM_CACHED_TOKENS)
    assert transfer.is_finished


def test_the_opening_comes_first_and_then_nothing_until_something_is_computed() -> None:
    transfer = make_transfer(2, 3)
    assert [type(message) for message in take_all(transfer)] == [pb.TransferOpen]
    assert transfer.next_message() is None
    transfer.mark_ready(1, 2)
    assert [cells(message) for message in take_all(transfer)] == [[(0, 0), (0, 1)]]


def test_the_first_blocks_leave_in_all_layers_before_later_ones_in_any() -> None:
    """So that what was sent is of use when the handoff breaks."""
    transfer = make_transfer(2, 3, max_chunk_bytes=0)
    transfer.complete(PrefillOutcome(FIRST_TOKEN_ID))
    _, *chunks, _ = take_all(transfer)
    assert [cells(message) for message in chunks] == [[(layer, block)] for block in range(3) for layer in range(2)]


def test_new_blocks_wake_whoever_waits_for_them() -> None:
    transfer = make_transfer(2, 3)
    assert not transfer.changed.is_set()
    transfer.mark_ready(1, 1)
    assert transfer.changed.is_set()


def test_the_commit_counts_the_chunks_that_left_in_the_end() -> None:
    transfer = make_transfer(2, 3)
    transfer.mark_ready(2, 1)
    early = list(take_all(transfer))
    transfer.complete(PrefillOutcome(FIRST_TOKEN_ID, NUM_CACHED_TOKENS))
    *late, commit = list(take_all(transfer))
    assert isinstance(commit, pb.TransferCommit)
    assert commit.num_chunks == len(early) - 1 + len(late) == 2


def test_a_full_chunk_fits_into_a_message() -> None:
    spec = make_spec(num_layers=1, num_kv_heads=8, head_size=128, block_size=16)
    num_blocks = MAX_CHUNK_BYTES // spec.layer_block_bytes + 1
    manager = KVCacheManager(spec, num_blocks)
    manager.extend("a", num_blocks * spec.block_size)
    lease = manager.leases.open("f" * 32, "a", manager.block_table("a"), now=0.0)
    transfer = OutgoingTransfer(PagedStorage(spec, num_blocks), lease, TransferTarget("nowhere:1", "f" * 32, 1))
    transfer.complete(PrefillOutcome(FIRST_TOKEN_ID, NUM_CACHED_TOKENS))
    _, first, *_ = take_all(transfer)
    assert isinstance(first, Chunk)
    assert len(first.payload) == MAX_CHUNK_BYTES == transfer.max_payload_bytes
    assert len(encode_message(first)) < MAX_MESSAGE_BYTES


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4])
@pytest.mark.parametrize("num_blocks", [1, 4, 20])
def test_the_slots_of_a_transfer_are_no_longer_than_two_chunks(num_blocks: int, num_slots: int) -> None:
    max_chunk_bytes = 10 * SPEC.layer_block_bytes
    transfer = make_transfer(2, num_blocks, max_chunk_bytes)
    slot_bytes = transfer.slot_bytes(num_slots)
    assert slot_bytes % transfer.block_bytes == 0
    assert transfer.block_bytes <= slot_bytes <= transfer.max_payload_bytes
    assert num_slots * slot_bytes <= 2 * max_chunk_bytes
    beside_bytes = SPEC.layer_block_bytes
    assert slot_bytes >= transfer.slot_bytes(num_slots, beside_bytes) >= transfer.block_bytes
    assert num_slots * (transfer.slot_bytes(num_slots, beside_bytes) + beside_bytes) <= 2 * max_chunk_bytes


@pytest.mark.parametrize("room_blocks", [1, 3, 8, 100])
def test_what_the_next_chunk_fills_is_known_before_it_is_made(room_blocks: int) -> None:
    transfer = make_transfer(3, 5, max_chunk_bytes=8 * make_spec().layer_block_bytes)
    room = memoryview(bytearray(room_blocks * transfer.block_bytes))
    assert transfer.next_payload_bytes(len(room)) == 0  # the opening
    transfer.mark_ready(2, 3)
    while (expected := transfer.next_payload_bytes(len(room))) or not transfer.is_finished:
        message = transfer.next_message(room)
        assert (len(message.payload) if isinstance(message, Chunk) else 0) == expected
        if not transfer.has_message:
            transfer.complete(PrefillOutcome(FIRST_TOKEN_ID))


def test_a_short_prompts_layers_share_a_chunk() -> None:
    transfer = make_transfer(5, 4, max_chunk_bytes=8 * make_spec().layer_block_bytes)
    transfer.complete(PrefillOutcome(FIRST_TOKEN_ID))
    _, *chunks, _ = take_all(transfer)
    assert [(chunk.layer, chunk.num_layers) for chunk in chunks if isinstance(chunk, Chunk)] == [(0, 2), (2, 2), (4, 1)]


def test_layers_that_are_not_as_far_do_not_share_a_chunk() -> None:
    transfer = make_transfer(3, 4)
    transfer.mark_ready(1, 4)
    transfer.mark_ready(3, 2)
    _, *chunks = take_all(transfer)
    assert [cells(chunk) for chunk in chunks] == [
        [(0, 0), (0, 1), (0, 2), (0, 3)],
        [(1, 0), (1, 1), (2, 0), (2, 1)],
    ]


def test_a_sender_whose_lease_has_ended_sends_no_more(handoff: Handoff) -> None:
    """Its blocks may belong to another sequence by now."""
    messages = iter(handoff.iter_messages())
    assert [type(next(messages)) for _ in range(2)] == [pb.TransferOpen, Chunk]
    handoff.source.manager.leases.abort(handoff.source_lease)
    with pytest.raises(TransferError) as caught:
        next(messages)
    assert caught.value.fault is TransferFault.ABORTED


def test_a_sender_sends_the_right_bytes_after_its_sequence_was_freed(handoff: Handoff) -> None:
    """The lease, not the sequence, protects the blocks: the next sequence gets others."""
    handoff.source.manager.free(REQUEST_ID)
    handoff.source.manager.extend("next", 2 * SPEC.block_size)
    for layer in range(SPEC.num_layers):
        table = handoff.source.manager.block_table("next")
        handoff.source.storage.write_blocks(layer, table, LAYER_BLOCK * 2)
    handoff.messages = list(handoff.iter_messages())
    handoff.deliver()
    assert handoff.target.read(REQUEST_ID) == handoff.expected
    handoff.source.manager.free("next")


def test_sending_over_a_closed_connection_is_a_lost_peer() -> None:
    """A stub that is made now would read memory that gRPC has freed."""

    async def scenario() -> None:
        channel = grpc.aio.insecure_channel("nowhere:1")  # connects with its first call
        await channel.close()
        with pytest.raises(TransferError) as raised:
            await send_kv(GrpcPort(lambda _: channel), make_transfer(num_layers=1, num_blocks=1), stall_timeout_s=1)
        assert raised.value.fault is TransferFault.PEER_LOST

    asyncio.run(scenario())
