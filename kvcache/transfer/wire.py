"""The messages of a handoff, as bytes and back, and how each proves what it is.

On the wire every message is a ``TransferMessage`` of the .proto, so that any protobuf library can speak it. A chunk is
nearly all payload, though, which protobuf would copy twice on each side; so its few bytes of framing are put before the
payload by hand here, and taken off without a copy::

    0x12 length │ KVChunk: other fields  │ 0x3a length │ payload            a chunk with its payload last
    └ field 2 of TransferMessage           └ field 7 of KVChunk

A chunk that is framed in another way that protobuf allows (fields in another order, say) is left to protobuf.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash
from google.protobuf.message import DecodeError

from kvcache.errors import TransferError, TransferFault
from kvcache.spec import KVCacheSpec
from kvcache.transfer import kv_transfer_pb2 as pb

MAX_CHUNK_BYTES = 2 << 20  # what a chunk costs beside its bytes is as much as half a MiB of them
MAX_BLOCK_BYTES = 15 << 20  # of one layer: a chunk of one block may be larger than MAX_CHUNK_BYTES
MAX_MESSAGE_BYTES = 16 << 20  # the gRPC limit
FAULT_METADATA_KEY = "twinpool-fault"

_CHUNK_TAG = 0x12  # TransferMessage.chunk, length-delimited
_PAYLOAD_TAG = 0x3A  # KVChunk.payload, length-delimited
_MAX_HEADER_BYTES = 1 << 10  # of a chunk that is read by hand: a transfer id and seven numbers

_CHUNK = struct.Struct("<QIIIII")
_COMMIT = struct.Struct("<QIII")


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """A range of logical blocks, the same in ``num_layers`` layers."""

    layer: int  # the first
    first_block: int
    num_blocks: int
    num_layers: int = 1


@dataclass(slots=True)
class Chunk:
    """``KVChunk`` of the .proto, with a payload that may be memory of somebody else's: layer by layer, in each
    block by block."""

    transfer_id: str
    epoch: int
    layer: int
    first_block: int
    num_blocks: int
    checksum: int
    payload: bytes | memoryview
    num_layers: int = 1
    index: int = 0  # of the transfer's chunks

    @property
    def where(self) -> ChunkRange:
        return ChunkRange(self.layer, self.first_block, self.num_blocks, self.num_layers)


Message = pb.TransferOpen | Chunk | pb.TransferCommit


def encode_message(message: Message) -> bytes:
    if isinstance(message, pb.TransferOpen):
        return pb.TransferMessage(open=message).SerializeToString()
    if isinstance(message, pb.TransferCommit):
        return pb.TransferMessage(commit=message).SerializeToString()
    return b"".join((encode_before_payload(message), message.payload))


def encode_before_payload(chunk: Chunk) -> bytes:
    """All of a chunk's message but its payload, which comes last."""
    header = chunk_header(chunk).SerializeToString()
    payload_length = _varint(len(chunk.payload))
    length = _varint(len(header) + 1 + len(payload_length) + len(chunk.payload))
    return b"".join((bytes((_CHUNK_TAG,)), length, header, bytes((_PAYLOAD_TAG,)), payload_length))


def decode_message(data: bytes) -> Message:
    """The payload of a chunk is a view into ``data``.

    Raises:
        TransferError: these bytes are no message.
    """
    try:
        chunk = _decode_chunk(memoryview(data))
        if chunk is not None:
            return chunk
        message = pb.TransferMessage.FromString(data)
    except DecodeError:
        raise TransferError(TransferFault.MALFORMED, f"a message of {len(data)} bytes is not protobuf") from None
    match message.WhichOneof("message"):
        case "open":
            return message.open
        case "chunk":
            return chunk_from_header(message.chunk, message.chunk.payload)
        case "commit":
            return message.commit
        case _:
            raise TransferError(TransferFault.MALFORMED, "a message without content")


def chunk_header(chunk: Chunk) -> pb.KVChunk:
    """All but the payload."""
    return pb.KVChunk(
        transfer_id=chunk.transfer_id,
        epoch=chunk.epoch,
        layer=chunk.layer,
        first_block=chunk.first_block,
        num_blocks=chunk.num_blocks,
        checksum=chunk.checksum,
        num_layers=chunk.num_layers,
        index=chunk.index,
    )


def chunk_from_header(header: pb.KVChunk, payload: bytes | memoryview) -> Chunk:
    numbers = (header.epoch, header.layer, header.first_block, header.num_blocks, header.checksum)
    return Chunk(header.transfer_id, *numbers, payload, header.num_layers, header.index)


def _decode_chunk(data: memoryview) -> Chunk | None:
    """None: not a chunk, or not with its payload last."""
    try:
        if data[0] != _CHUNK_TAG:
            return None
        length, first = _read_varint(data, 1)
        at = first
        while data[at] != _PAYLOAD_TAG:
            at = _skip_field(data, at)
            if at > first + _MAX_HEADER_BYTES:
                return None
        payload_length, payload_at = _read_varint(data, at + 1)
    except (IndexError, ValueError):  # cut off, or of a kind that a chunk does not have
        return None
    if first + length != len(data) or payload_at + payload_length != len(data):
        return None
    return chunk_from_header(pb.KVChunk.FromString(bytes(data[first:at])), data[payload_at:])


def _skip_field(data: memoryview, at: int) -> int:
    """Where the field after the one at ``at`` begins."""
    match data[at] & 7:
        case 0:
            return _read_varint(data, at + 1)[1]
        case 1:
            return at + 9
        case 2:
            length, begin = _read_varint(data, at + 1)
            return begin + length
        case kind:
            raise ValueError(f"wire type {kind}")


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number, and where what follows it begins."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def chunk_checksum(transfer_id: str, epoch: int, index: int, where: ChunkRange, payload: bytes | memoryview) -> int:
    """XXH3-64 over the header and the payload, so that a bit flipped in either is seen.

    The header is the length of the transfer id (u32), the id in UTF-8, then epoch (u64), index, layer, layer count,
    first block and block count (u32 each), little-endian.
    """
    digest = _digest_of(transfer_id)
    digest.update(_CHUNK.pack(epoch, index, where.layer, where.num_layers, where.first_block, where.num_blocks))
    digest.update(payload)
    return digest.intdigest()


def commit_checksum(transfer_id: str, epoch: int, num_chunks: int, first_token_id: int, num_cached_tokens: int) -> int:
    """XXH3-64 over the length of the transfer id (u32), the id, epoch (u64), and the other three (u32 each)."""
    digest = _digest_of(transfer_id)
    digest.update(_COMMIT.pack(epoch, num_chunks, first_token_id, num_cached_tokens))
    return digest.intdigest()


def _digest_of(transfer_id: str) -> xxhash.xxh3_64:
    encoded = transfer_id.encode()
    return xxhash.xxh3_64(len(encoded).to_bytes(4, "little") + encoded)


def make_chunk(transfer_id: str, epoch: int, index: int, where: ChunkRange, payload: bytes | memoryview) -> Chunk:
    """Sealed with its checksum."""
    checksum = chunk_checksum(transfer_id, epoch, index, where, payload)
    numbers = (where.layer, where.first_block, where.num_blocks, checksum)
    return Chunk(transfer_id, epoch, *numbers, payload, where.num_layers, index)


def make_commit(
    transfer_id: str, epoch: int, num_chunks: int, first_token_id: int, num_cached_tokens: int = 0
) -> pb.TransferCommit:
    return pb.TransferCommit(
        transfer_id=transfer_id,
        epoch=epoch,
        num_chunks=num_chunks,
        first_token_id=first_token_id,
        num_cached_tokens=num_cached_tokens,
        checksum=commit_checksum(transfer_id, epoch, num_chunks, first_token_id, num_cached_tokens),
    )


def spec_to_wire(spec: KVCacheSpec) -> pb.KVSpec:
    return pb.KVSpec(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        block_size=spec.block_size,
        dtype=spec.dtype,
    )


def spec_from_wire(spec: pb.KVSpec) -> KVCacheSpec:
    """
    Raises:
        ConfigError: a field is zero or the dtype unknown.
    """
    return KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_size, spec.block_size, spec.dtype)
