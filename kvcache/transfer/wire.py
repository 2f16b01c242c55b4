"""Chunks: how a handoff is cut into messages and how each proves what it is."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from kvcache.spec import KVCacheSpec
from kvcache.transfer import kv_transfer_pb2 as pb

MAX_CHUNK_BYTES = 1 << 20
MAX_BLOCK_BYTES = 15 << 20  # of one layer: a chunk of one block may be larger than MAX_CHUNK_BYTES
MAX_MESSAGE_BYTES = 16 << 20  # the gRPC limit
FAULT_METADATA_KEY = "twinpool-fault"

_RANGE = struct.Struct("<QIII")
_COMMIT = struct.Struct("<QIII")


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """A range of logical blocks of one layer."""

    layer: int
    first_block: int
    num_blocks: int


def chunk_checksum(transfer_id: str, epoch: int, chunk: ChunkRange, payload: bytes | memoryview) -> int:
    """XXH3-64 over the header and the payload, so that a bit flipped in either is seen.

    The header is the length of the transfer id (u32), the id in UTF-8, then epoch (u64), layer, first block and
    block count (u32 each), little-endian.
    """
    digest = _digest_of(transfer_id)
    digest.update(_RANGE.pack(epoch, chunk.layer, chunk.first_block, chunk.num_blocks))
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


def make_chunk(transfer_id: str, epoch: int, chunk: ChunkRange, payload: bytes) -> pb.KVChunk:
    return pb.KVChunk(
        transfer_id=transfer_id,
        epoch=epoch,
        layer=chunk.layer,
        first_block=chunk.first_block,
        num_blocks=chunk.num_blocks,
        checksum=chunk_checksum(transfer_id, epoch, chunk, payload),
        payload=payload,
    )


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
