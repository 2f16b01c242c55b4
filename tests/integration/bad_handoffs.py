"""Every way in which a handoff can be wrong, as messages, and the fault that each must be refused with."""

from __future__ import annotations

from collections.abc import Callable

from kvcache.errors import TransferFault
from kvcache.spec import KVCacheSpec
from kvcache.transfer import kv_transfer_pb2 as kv_pb
from kvcache.transfer.wire import ChunkRange
from tests.integration.fake_prefill import Handoff

Messages = list[kv_pb.TransferMessage]
Tamper = Callable[[Handoff, KVCacheSpec], Messages]
PROMPT_TOKENS = 70  # five blocks, which the messages below count on


def flipped_bit(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    payload = bytearray(messages[2].chunk.payload)
    payload[1234] ^= 0x10
    messages[2].chunk.payload = bytes(payload)
    return messages


def flipped_header_bit(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    """Layer 2 announced as layer 0: every length is right, only the checksum tells."""
    messages = handoff.messages(spec)
    messages[3].chunk.layer = 0
    return messages


def truncated_payload(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[2] = handoff.chunk(1, ChunkRange(1, 0, 5), messages[2].chunk.payload[:-4])
    return messages


def oversized_payload(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[2] = handoff.chunk(1, ChunkRange(1, 0, 5), messages[2].chunk.payload + bytes(spec.layer_block_bytes))
    return messages


def oversized_length(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[2] = handoff.chunk(1, ChunkRange(1, 0, 2**32 - 1), messages[2].chunk.payload)
    return messages


def blocks_beyond_the_end(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[2] = handoff.chunk(1, ChunkRange(1, 1, 5), messages[2].chunk.payload)
    return messages


def unknown_layer(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[2] = handoff.chunk(1, ChunkRange(spec.num_layers, 0, 5), messages[2].chunk.payload)
    return messages


def repeated_chunk(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    return [*messages[:2], messages[1], *messages[2:]]


def second_opening(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    return [messages[0], *messages]


def empty_message(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    return [*messages[:2], kv_pb.TransferMessage(), *messages[2:]]


def wrong_transfer_id(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[0].open.transfer_id = "0" * 32
    return messages


def wrong_transfer_id_in_a_chunk(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[2].chunk.transfer_id = "0" * 32
    return messages


def stale_epoch(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[0].open.epoch -= 1
    return messages


def stale_epoch_in_the_commit(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[-1].commit.epoch -= 1
    return messages


def missing_chunk(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    return [*messages[:2], *messages[3:]]


def missing_last_chunk(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    return [*messages[:-2], messages[-1]]


def reordered_chunks(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    return [messages[0], messages[2], messages[1], *messages[3:]]


def miscounted_chunks(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    return [*handoff.messages(spec)[:-1], handoff.commit(spec.num_layers + 1)]


def chunk_behind_the_commit(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    return [*messages[:-2], messages[-1], messages[-2]]


def no_commit(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    return handoff.messages(spec)[:-1]


def chunk_before_open(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    return handoff.messages(spec)[1:]


def commit_alone(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    return handoff.messages(spec)[-1:]


def nothing_at_all(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    return []


def another_block_size(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[0].open.spec.block_size *= 2
    return messages


def too_few_blocks(handoff: Handoff, spec: KVCacheSpec) -> Messages:
    messages = handoff.messages(spec)
    messages[0].open.num_blocks -= 1
    return messages


REFUSED: tuple[tuple[Tamper, TransferFault], ...] = (
    (flipped_bit, TransferFault.BAD_CHECKSUM),
    (flipped_header_bit, TransferFault.BAD_CHECKSUM),
    (truncated_payload, TransferFault.BAD_LENGTH),
    (oversized_payload, TransferFault.BAD_LENGTH),
    (oversized_length, TransferFault.OUT_OF_BOUNDS),
    (blocks_beyond_the_end, TransferFault.OUT_OF_BOUNDS),
    (unknown_layer, TransferFault.OUT_OF_BOUNDS),
    (repeated_chunk, TransferFault.REPEATED),
    (second_opening, TransferFault.REPEATED),
    (empty_message, TransferFault.MALFORMED),
    (wrong_transfer_id, TransferFault.UNKNOWN_TRANSFER),
    (wrong_transfer_id_in_a_chunk, TransferFault.UNKNOWN_TRANSFER),
    (stale_epoch, TransferFault.STALE_EPOCH),
    (stale_epoch_in_the_commit, TransferFault.STALE_EPOCH),
    (missing_chunk, TransferFault.OUT_OF_ORDER),
    (missing_last_chunk, TransferFault.INCOMPLETE),
    (reordered_chunks, TransferFault.OUT_OF_ORDER),
    (miscounted_chunks, TransferFault.INCOMPLETE),
    (chunk_behind_the_commit, TransferFault.INCOMPLETE),
    (no_commit, TransferFault.PEER_LOST),
    (nothing_at_all, TransferFault.PEER_LOST),
    (chunk_before_open, TransferFault.UNKNOWN_TRANSFER),
    (commit_alone, TransferFault.UNKNOWN_TRANSFER),
    (another_block_size, TransferFault.INCOMPATIBLE),
    (too_few_blocks, TransferFault.INCOMPATIBLE),
)
