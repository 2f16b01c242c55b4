"""A checksum covers all that a chunk says; a spec survives the wire."""

from __future__ import annotations

from dataclasses import replace

import pytest
import xxhash
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvcache.errors import ConfigError, TransferError, TransferFault
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.wire import (
    Chunk,
    ChunkRange,
    chunk_checksum,
    chunk_header,
    commit_checksum,
    decode_message,
    encode_message,
    make_chunk,
    make_commit,
    spec_from_wire,
    spec_to_wire,
)
from tests.builders import make_spec, repeatable

CHUNK = ChunkRange(layer=3, first_block=5, num_blocks=2, num_layers=4)
PAYLOAD = bytes(range(7, 47))
HUGE = ChunkRange(2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1)


@pytest.mark.parametrize(
    ("transfer_id", "epoch", "index", "chunk", "payload"),
    [
        ("transfer", 1, 8, CHUNK, PAYLOAD),
        ("ü" * 9, 2**64 - 1, 2**32 - 1, HUGE, b""),
        ("", 0, 0, ChunkRange(0, 0, 0), b"\0"),
    ],
)
def test_the_checksum_is_over_header_and_payload_as_documented(
    transfer_id: str, epoch: int, index: int, chunk: ChunkRange, payload: bytes
) -> None:
    numbers = [index, chunk.layer, chunk.num_layers, chunk.first_block, chunk.num_blocks]
    encoded = transfer_id.encode("utf-8")
    layout = len(encoded).to_bytes(4, "little") + encoded + epoch.to_bytes(8, "little")
    layout += b"".join(number.to_bytes(4, "little") for number in numbers) + payload
    assert chunk_checksum(transfer_id, epoch, index, chunk, payload) == xxhash.xxh3_64_intdigest(layout)


def test_every_field_of_a_commit_changes_its_checksum_as_documented() -> None:
    encoded = "übertragung".encode()
    layout = len(encoded).to_bytes(4, "little") + encoded + (5).to_bytes(8, "little")
    layout += (7).to_bytes(4, "little") + (11).to_bytes(4, "little") + (13).to_bytes(4, "little")
    sealed = commit_checksum("übertragung", 5, 7, 11, 13)
    assert sealed == xxhash.xxh3_64_intdigest(layout)
    others = {
        commit_checksum("ubertragung", 5, 7, 11, 13),
        commit_checksum("übertragung", 4, 7, 11, 13),
        commit_checksum("übertragung", 5, 6, 11, 13),
        commit_checksum("übertragung", 5, 7, 10, 13),
        commit_checksum("übertragung", 5, 7, 11, 12),
    }
    assert len(others | {sealed}) == 6


def test_every_bit_of_the_payload_changes_the_checksum() -> None:
    checksums = {chunk_checksum("transfer", 1, 8, CHUNK, PAYLOAD)}
    for bit in range(8 * len(PAYLOAD)):
        flipped = bytearray(PAYLOAD)
        flipped[bit // 8] ^= 1 << bit % 8
        checksums.add(chunk_checksum("transfer", 1, 8, CHUNK, bytes(flipped)))
    assert len(checksums) == 1 + 8 * len(PAYLOAD)


@pytest.mark.parametrize("field", ["layer", "first_block", "num_blocks", "num_layers"])
def test_every_bit_of_a_range_changes_the_checksum(field: str) -> None:
    before = chunk_checksum("transfer", 1, 8, CHUNK, PAYLOAD)
    for bit in range(32):
        flipped = replace(CHUNK, **{field: getattr(CHUNK, field) ^ (1 << bit)})
        assert chunk_checksum("transfer", 1, 8, flipped, PAYLOAD) != before


def test_every_bit_of_the_index_changes_the_checksum() -> None:
    before = chunk_checksum("transfer", 1, 8, CHUNK, PAYLOAD)
    assert all(chunk_checksum("transfer", 1, 8 ^ (1 << bit), CHUNK, PAYLOAD) != before for bit in range(32))


def test_every_bit_of_the_epoch_and_of_the_transfer_id_changes_the_checksum() -> None:
    before = chunk_checksum("transfer", 1, 8, CHUNK, PAYLOAD)
    assert all(chunk_checksum("transfer", 1 ^ (1 << bit), 8, CHUNK, PAYLOAD) != before for bit in range(64))
    for bit in range(8 * len("transfer")):
        flipped = bytearray(b"transfer")
        flipped[bit // 8] ^= 1 << bit % 8
        if flipped[bit // 8] < 0x80:  # the others are no UTF-8
            assert chunk_checksum(flipped.decode(), 1, 8, CHUNK, PAYLOAD) != before


def test_a_chunk_message_says_what_its_checksum_covers() -> None:
    message = make_chunk("transfer", 9, 8, CHUNK, PAYLOAD)
    assert (message.transfer_id, message.epoch, message.payload) == ("transfer", 9, PAYLOAD)
    assert (message.where, message.index) == (CHUNK, 8)
    assert message.checksum == chunk_checksum("transfer", 9, 8, CHUNK, PAYLOAD)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_spec_comes_back_from_the_wire_as_it_was(dtype: str) -> None:
    spec = make_spec(num_layers=3, num_kv_heads=5, head_size=7, block_size=11, dtype=dtype)
    assert spec_from_wire(pb.KVSpec.FromString(spec_to_wire(spec).SerializeToString())) == spec


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_size", "block_size", "dtype"])
def test_a_spec_without_a_field_is_refused_by_name(field: str) -> None:
    message = spec_to_wire(make_spec())
    message.ClearField(field)
    with pytest.raises(ConfigError, match=field):
        spec_from_wire(message)


# What is framed by hand is what protobuf reads and writes.

UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
CHUNKS = st.builds(
    Chunk,
    transfer_id=st.text(max_size=40),
    epoch=UINT64,
    layer=UINT32,
    first_block=UINT32,
    num_blocks=UINT32,
    checksum=UINT64,
    payload=st.binary(max_size=300),
    num_layers=UINT32,
    index=UINT32,
)


def by_protobuf(chunk: Chunk) -> pb.KVChunk:
    message = chunk_header(chunk)
    message.payload = bytes(chunk.payload)
    return message


@given(chunk=CHUNKS)
@repeatable(200)
def test_protobuf_reads_what_is_framed_by_hand_and_the_other_way_round(chunk: Chunk) -> None:
    told = pb.TransferMessage(chunk=by_protobuf(chunk))
    assert pb.TransferMessage.FromString(encode_message(chunk)) == told
    assert decode_message(told.SerializeToString()) == chunk
    assert decode_message(encode_message(chunk)) == chunk


def test_a_payload_is_read_without_a_copy() -> None:
    data = encode_message(make_chunk("transfer", 9, 8, CHUNK, PAYLOAD))
    chunk = decode_message(data)
    assert isinstance(chunk, Chunk) and isinstance(chunk.payload, memoryview)
    assert chunk.payload.obj is data


def test_a_chunk_whose_payload_does_not_come_last_is_read_too() -> None:
    chunk = make_chunk("transfer", 9, 8, CHUNK, PAYLOAD)
    header = chunk_header(chunk).SerializeToString()
    payload = pb.KVChunk(payload=PAYLOAD).SerializeToString()
    framed = b"\x12" + bytes((len(header) + len(payload),)) + payload + header
    assert decode_message(framed) == chunk


def test_a_header_without_end_is_left_to_protobuf() -> None:
    """Taken apart by hand, it would hold the event loop up."""
    padding = b"\x18\x01" * 500_000  # field 3, again and again: the last one counts
    framed = b"\x12" + b"\xc0\x84\x3d" + padding
    assert decode_message(framed) == Chunk("", 0, 1, 0, 0, 0, b"", num_layers=0)


@pytest.mark.parametrize("message", [pb.TransferOpen(transfer_id="t", epoch=3), make_commit("t", 3, 5, 7, 11)])
def test_openings_and_commits_come_back_as_they_were(message: pb.TransferOpen | pb.TransferCommit) -> None:
    assert decode_message(encode_message(message)) == message


def read_by_hand(data: bytes) -> object:
    try:
        message = decode_message(data)
    except TransferError as error:
        return error.fault
    return by_protobuf(message) if isinstance(message, Chunk) else message


def read_by_protobuf(data: bytes) -> object:
    try:
        message = pb.TransferMessage.FromString(data)
    except DecodeError:
        return TransferFault.MALFORMED
    kind = message.WhichOneof("message")
    return TransferFault.MALFORMED if kind is None else getattr(message, kind)


@given(chunk=CHUNKS, length=st.integers(0, 400), tail=st.binary(max_size=60))
@repeatable(300)
def test_any_bytes_are_a_message_as_protobuf_reads_it_or_refused(chunk: Chunk, length: int, tail: bytes) -> None:
    data = encode_message(chunk)[:length] + tail
    assert read_by_hand(data) == read_by_protobuf(data)
