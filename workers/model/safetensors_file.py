"""The safetensors container, read without its weights: which files, and what each header says.

::

    8 bytes   header length N, unsigned, little endian
    N bytes   JSON: {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, "__metadata__": {..}}
    rest      the tensors' bytes, back to back, in the order of their offsets

Format: the safetensors library's documentation. Reading the header ourselves costs milliseconds and needs
no array library.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kvcache.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# What reading damaged JSON and its numbers ends in: Infinity is no integer, and brackets may be deeper than the stack.
JSON_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

# The format's own limit on the JSON part: what claims more is not a safetensors file.
MAX_HEADER_BYTES = 100_000_000
HEADER_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as the header describes it. ``dtype`` is the format's own name ("F32", "BF16" ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights, as ``transformers`` would choose them.

    Raises ModelError where there are none, naming pickle files if those are all there is.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return _indexed_files(index)
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickled = sorted(path.name for suffix in PICKLE_SUFFIXES for path in folder.glob(f"*{suffix}"))
    if pickled:
        raise ModelError(
            f"{folder} has its weights only as pickle files ({pickled[0]}), which can run code when read: "
            f"Twinpool loads safetensors and GGUF."
        )
    raise ModelError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there.")


def _indexed_files(index: Path) -> list[Path]:
    """Files that the index names; every one must exist and lie beside the index."""
    names = sorted(set(_weight_map(index).values()))
    files = [index.parent / name for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} points to {name!r}, which is not a safetensors file beside it.")
        if not file.is_file():
            raise ModelError(f"{index} names {name}, which is not in {index.parent}.")
    if not files:
        raise ModelError(f"{index} names no weight file.")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to file name, as the index says."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {str(tensor): str(name) for tensor, name in weight_map.items()}
    except JSON_ERRORS as error:
        raise ModelError(f"{index} is not a safetensors index: {type(error).__name__}: {error}.") from error


def read_checked_headers(folder: Path) -> list[TensorHeader]:
    """Every tensor of the model. Each must be in one file only, and in the one where the index says.

    Raises:
        ModelError: naming the tensor and the file.
    """
    index = folder / INDEX_FILE
    file_of: dict[str, str] = {}
    headers: list[TensorHeader] = []
    for file in weight_files(folder):
        for header in read_headers(file):
            if header.name in file_of:
                files = f"{file_of[header.name]} and {file.name}"
                raise ModelError(f"{folder} holds the tensor {header.name} twice, in {files}.")
            file_of[header.name] = file.name
            headers.append(header)
    for tensor, name in _weight_map(index).items() if index.is_file() else ():
        if file_of.get(tensor) != name:
            raise ModelError(f"{index} says that {tensor} is in {name}, where it is not.")
    return headers


def read_headers(file: Path) -> list[TensorHeader]:
    """Every tensor of one file, without its data. A file shorter than its header promises is a ModelError."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = HEADER_LENGTH.unpack(stream.read(HEADER_LENGTH.size))
            if length > min(MAX_HEADER_BYTES, size - HEADER_LENGTH.size):
                raise ValueError(f"it claims a header of {length} bytes")
            table = json.loads(stream.read(length))
        tensors = [_header(name, entry) for name, entry in table.items() if name != "__metadata__"]
    except (*JSON_ERRORS, struct.error) as error:
        raise ModelError(f"{file} is not a safetensors file: {type(error).__name__}: {error}.") from error
    expected = HEADER_LENGTH.size + length + sum(tensor.num_bytes for tensor in tensors)
    if size != expected:
        raise ModelError(f"{file} is damaged: it has {size} bytes where its header describes {expected}.")
    return tensors


def _header(name: str, entry: dict[str, object]) -> TensorHeader:
    offsets, shape = entry["data_offsets"], entry["shape"]
    if not isinstance(offsets, list) or not isinstance(shape, list):
        raise ValueError(f"tensor {name} has no offsets or no shape")
    begin, end = (int(offset) for offset in offsets)
    if begin < 0 or end < begin:
        raise ValueError(f"tensor {name} has offsets {begin} to {end}")
    return TensorHeader(name, str(entry["dtype"]), tuple(int(size) for size in shape), end - begin)
