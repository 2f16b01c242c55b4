"""Writes a safetensors file one tensor at a time, so that a conversion never holds the whole model in memory.

The layout is drawn in ``safetensors_file``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from kvcache.errors import ModelError
from workers.model.safetensors_file import HEADER_LENGTH


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A float32 tensor that is about to be written."""

    name: str
    shape: tuple[int, ...]


def write_float32(file: Path, shapes: Sequence[TensorShape], tensors: Iterable[np.ndarray]) -> None:
    """Writes ``tensors``, which come in the order of ``shapes``, as a float32 file marked for PyTorch.

    Takes one tensor at a time from the iterable and keeps none. A shape that differs is a ModelError.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shapes:
        end = offset + prod(entry.shape) * 4
        table[entry.name] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table, separators=(",", ":")).encode()
    # The data must start at a multiple of 8 bytes; the format pads with spaces.
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(HEADER_LENGTH.pack(len(header)))
        stream.write(header)
        for entry, tensor in zip(shapes, tensors, strict=True):
            if tensor.shape != entry.shape:
                raise ModelError(f"Tensor {entry.name} has shape {tensor.shape} instead of {entry.shape}.")
            stream.write(np.ascontiguousarray(tensor, dtype="<f4").data)
