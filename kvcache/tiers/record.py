"""One block outside the cache, as bytes: the chunks that a handoff of it would send, one for each layer.

::

    record:  [u32 length][KVChunk of layer 0] [u32 length][KVChunk of layer 1] …      little-endian

The chunk's transfer id is the block's name in the prefix index, so its checksum proves that these bytes are the KV of
just these tokens, and its epoch is the version of this format.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kvcache.errors import TransferError, TransferFault
from kvcache.spec import KVCacheSpec
from kvcache.transfer.wire import Chunk, ChunkRange, chunk_checksum, decode_message, encode_message, make_chunk

FORMAT = 2  # 1 had chunks without an index
_LENGTH = struct.Struct("<I")
_ONE_BLOCK_OF = 0, 1


def encode_block(name: bytes, layers: Sequence[bytes | memoryview]) -> bytes:
    """``layers[l]`` is the block in layer ``l``, as the storage gives it."""
    parts = []
    for layer, payload in enumerate(layers):
        message = encode_message(make_chunk(name.hex(), FORMAT, layer, ChunkRange(layer, *_ONE_BLOCK_OF), payload))
        parts += [_LENGTH.pack(len(message)), message]
    return b"".join(parts)


def decode_block(name: bytes, spec: KVCacheSpec, record: bytes) -> list[bytes | memoryview]:
    """The block layer by layer, as views into ``record``.

    Raises:
        TransferError: damaged, cut off, of another block, or of a cache of another shape.
    """
    layers: list[bytes | memoryview] = []
    data = memoryview(record)
    while len(data) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(data)
        message = decode_message(bytes(data[_LENGTH.size : _LENGTH.size + length]))
        layers.append(_payload_of(message, name, len(layers), spec))
        data = data[_LENGTH.size + length :]
    if len(data) or len(layers) != spec.num_layers:
        raise TransferError(TransferFault.BAD_LENGTH, f"a record of {len(layers)} layers, not {spec.num_layers}")
    return layers


def _payload_of(message: object, name: bytes, layer: int, spec: KVCacheSpec) -> bytes | memoryview:
    if not isinstance(message, Chunk):
        raise TransferError(TransferFault.MALFORMED, "a record holds chunks only")
    where = ChunkRange(layer, *_ONE_BLOCK_OF)
    if message.transfer_id != name.hex() or message.epoch != FORMAT or message.where != where:
        raise TransferError(TransferFault.UNKNOWN_TRANSFER, "a record of another block")
    if len(message.payload) != spec.layer_block_bytes:
        raise TransferError(TransferFault.BAD_LENGTH, "a record of blocks of another size")
    if chunk_checksum(message.transfer_id, FORMAT, layer, where, message.payload) != message.checksum:
        raise TransferError(TransferFault.BAD_CHECKSUM, f"layer {layer} of a record")
    return message.payload
