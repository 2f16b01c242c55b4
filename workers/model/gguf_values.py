"""The values of a GGUF tensor as a torch tensor. The layouts of the blocks are drawn in ``gguf_types``.

Blocks are turned into values some at a time, so that the intermediate results stay in a core's cache and the memory
taken beside the result is constant. Every value is computed in float32 in the same order as the reference does, and
rounded once, to the dtype asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.model.gguf_file import GGUFTensor
from workers.model.gguf_types import BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q6_K, Q8_0, TensorType

CHUNK_VALUES = 1 << 17  # 512 KiB in float32
_PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


def read_values(tensor: GGUFTensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in its shape. A plain tensor that has ``dtype`` already is a view of the mapped file."""
    if tensor.kind in _PLAIN:
        stored = torch.from_numpy(tensor.data).view(_PLAIN[tensor.kind])
        return stored.to(dtype).view(tensor.shape)
    return _decode_blocks(tensor, dtype)


def _decode_blocks(tensor: GGUFTensor, dtype: torch.dtype) -> torch.Tensor:
    kind, decode = tensor.kind, _DECODERS[tensor.kind]
    blocks = torch.from_numpy(tensor.data).view(-1, kind.block_bytes)
    values = torch.empty(tensor.shape, dtype=dtype)
    rows = values.view(-1, kind.block_values)
    step = CHUNK_VALUES // kind.block_values
    chunk = torch.empty(min(step, len(rows)), kind.block_values)
    for start in range(0, len(rows), step):
        target = rows[start : start + step]
        into = target if dtype is torch.float32 else chunk[: len(target)]
        decode(blocks[start : start + step], into)
        if into is not target:
            target.copy_(into)
    return values


def _half(blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The float16 numbers in the bytes from ``start`` to ``stop`` of each block, ``[blocks, numbers]`` in float32."""
    return blocks[:, start:stop].contiguous().view(torch.float16).float()


def _decode_q4_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    stored = blocks[:, 2:]
    values[:, :16] = stored & 15
    values[:, 16:] = stored >> 4
    values.sub_(8).mul_(_half(blocks, 0, 2))


def _decode_q4_1(blocks: torch.Tensor, values: torch.Tensor) -> None:
    stored = blocks[:, 4:]
    values[:, :16] = stored & 15
    values[:, 16:] = stored >> 4
    values.mul_(_half(blocks, 0, 2)).add_(_half(blocks, 2, 4))


def _decode_q8_0(blocks: torch.Tensor, values: torch.Tensor) -> None:
    values.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0, 2))


def _decode_q4_k(blocks: torch.Tensor, values: torch.Tensor) -> None:
    packed = blocks[:, 4:16].view(-1, 3, 4)  # scales 0-3, minima 0-3, low halves of scales and minima 4-7
    scale, minimum, rest = packed.unbind(1)
    scales = torch.cat([scale & 63, (rest & 15) | (scale >> 6 << 4)], dim=1).float()
    minima = torch.cat([minimum & 63, (rest >> 4) | (minimum >> 6 << 4)], dim=1).float()
    scales.mul_(_half(blocks, 0, 2))
    minima.mul_(_half(blocks, 2, 4))
    stored = blocks[:, 16:].view(-1, 4, 32)  # 32 bytes hold 32 values in their low and the next 32 in their high halves
    groups = values.view(-1, 4, 2, 32)
    groups[:, :, 0] = stored & 15
    groups[:, :, 1] = stored >> 4
    values.view(-1, 8, 32).mul_(scales.unsqueeze(2)).sub_(minima.unsqueeze(2))


def _decode_q6_k(blocks: torch.Tensor, values: torch.Tensor) -> None:
    low = blocks[:, :128].view(-1, 2, 2, 32)  # two halves of the block, each 2 x 32 bytes
    high = blocks[:, 128:192].view(-1, 2, 32)  # two bits of each of the four groups of 32 values
    groups = values.view(-1, 2, 4, 32)
    for index in range(4):
        bits = low[:, :, index % 2] >> 4 if index >= 2 else low[:, :, index % 2] & 15
        groups[:, :, index] = bits | ((high >> 2 * index & 3) << 4)
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208, 210))
    values.view(-1, 16, 16).sub_(32).mul_(scales.unsqueeze(2))


_DECODERS: dict[TensorType, Callable[[torch.Tensor, torch.Tensor], None]] = {
    Q4_0: _decode_q4_0,
    Q4_1: _decode_q4_1,
    Q8_0: _decode_q8_0,
    Q4_K: _decode_q4_k,
    Q6_K: _decode_q6_k,
}
