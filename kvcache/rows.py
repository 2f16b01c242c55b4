"""Keys and values to the rows of a cache and back; ``KVCacheSpec`` draws a row.

The tensor of a cache tells its format: ``int8`` is int8, ``uint8`` holds the bits of fp8, others are what they say.
"""

from __future__ import annotations

import torch

from kvcache.spec import SCALE_BYTES

INT8_MAX = 127.0
FP8_MAX = 448.0


def encode_rows(numbers: torch.Tensor, cache_dtype: torch.dtype) -> torch.Tensor:
    """``[..., head_size]`` as rows of a cache of ``cache_dtype``: ``[..., row size]``.

    What is rounded gets the scale that fits its largest number. A row with NaN or infinity gives NaN when it is read.
    """
    if cache_dtype not in (torch.int8, torch.uint8):
        return numbers.to(cache_dtype)
    largest = numbers.abs().amax(dim=-1, keepdim=True).float()
    scale = largest / (INT8_MAX if cache_dtype == torch.int8 else FP8_MAX)
    scale = torch.where(scale == 0, 1.0, scale)  # zeros, and what is too small for a scale, read as zeros
    scaled = numbers.float() / scale
    if cache_dtype == torch.int8:
        rounded = scaled.nan_to_num(0.0).round().to(torch.int8)
    else:
        rounded = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return torch.cat((rounded, scale.contiguous().view(cache_dtype)), dim=-1)


def decode_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What ``encode_rows`` rounded, as ``dtype``: ``[..., head_size]``."""
    if rows.dtype not in (torch.int8, torch.uint8):
        return rows.to(dtype)
    numbers, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    if rows.dtype == torch.uint8:
        numbers = numbers.view(torch.float8_e4m3fn)
    return (numbers.float() * scale).to(dtype)
