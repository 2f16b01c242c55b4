"""The GGUF container, mapped into memory: its metadata, and where the bytes of each tensor lie.

::

    "GGUF"    version (u32), number of tensors (u64), number of metadata entries (u64)
    entries   key, type (u32), value; text is a length (u64) and UTF-8, an array is a type (u32), a length (u64), values
    tensors   name, number of dimensions (u32), dimensions (u64 each, fastest first), type (u32), offset (u64)
    padding   up to a multiple of general.alignment
    data      each tensor at its offset, which is a multiple of general.alignment too

All numbers are little endian. Format: the GGUF specification of the ggml project. We read it ourselves because the
gguf package makes a Python object of every element of every array: seconds for a vocabulary. Nothing that the file
claims is believed before it is compared with the file's size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from kvcache.errors import ModelError
from workers.model.gguf_names import SPLIT_NAME
from workers.model.gguf_types import READABLE_TYPES, TensorType, tensor_type, type_name

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 3 differs from 2 only by also allowing big-endian files, which are refused here
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

_TEXT, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_LENGTH = struct.Struct("<Q")
_MIN_ENTRY_BYTES = 8 + 4 + 1  # an empty key, a type, the smallest value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, type, offset

MetadataValue = bool | int | float | str | tuple[str, ...] | np.ndarray
"""An array of text is a tuple; an array of numbers is a numpy array."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor as stored. ``shape`` is in torch's order; ``data`` are its bytes, a view of the mapped file."""

    name: str
    shape: tuple[int, ...]
    kind: TensorType
    data: np.ndarray


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """``tensors`` keep the file mapped, copy-on-write: whoever writes to their bytes does not change the file."""

    path: Path
    metadata: dict[str, MetadataValue]
    tensors: tuple[GGUFTensor, ...]


def read_gguf(path: Path) -> GGUFFile:
    """One model: a file, or the first of ``name-00001-of-00003.gguf`` with all of its parts.

    Raises:
        ModelError: it is not GGUF, damaged, incomplete, or holds a tensor of a type that is not read here.
    """
    first = read_part(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return first
    parts = [first, *(read_part(part) for part in _other_parts(path, count))]
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    _refuse_repeated([tensor.name for tensor in tensors], path, "tensor")
    return GGUFFile(path, first.metadata, tensors)


def _other_parts(path: Path, count: int) -> Iterator[Path]:
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None or (int(match["number"]), int(match["count"])) != (1, count):
        first = f"-00001-of-{count:05}.gguf"
        raise ModelError(f"{path} is one of {count} parts of a model: give the first, whose name ends in {first}.")
    for number in range(2, count + 1):
        part = path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise ModelError(f"{path} needs {part.name}, which is not beside it.")
        yield part


def read_part(path: Path) -> GGUFFile:
    """One file, whether it is a whole model or a part of one. Raises ModelError."""
    try:
        content = np.memmap(path, dtype=np.uint8, mode="c")
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ModelError(f"{path} cannot be read as GGUF: {error}.") from error
    try:
        return _parse(path, content)
    except _DamagedError as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}.") from error


class _DamagedError(Exception):
    """The file contradicts itself; the message says where."""


class _Cursor:
    """Reads on from a position and never beyond the end."""

    def __init__(self, content: np.ndarray) -> None:
        self.position = 0
        self._view = content.data

    @property
    def remaining(self) -> int:
        return len(self._view) - self.position

    def take(self, num_bytes: int, what: str) -> memoryview:
        if num_bytes > self.remaining:
            raise _DamagedError(f"{what} needs {num_bytes} bytes where {self.remaining} are left")
        start = self.position
        self.position += num_bytes
        return self._view[start : self.position]

    def number(self, dtype: np.dtype[Any], what: str) -> int | float:
        value: int | float = np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        return value

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, min_bytes: int) -> int:
        """A number of things that follow, each of at least ``min_bytes``."""
        count = self.u64(what)
        if count * min_bytes > self.remaining:
            raise _DamagedError(f"it claims {count} {what} where {self.remaining} bytes are left")
        return count

    def text(self, what: str) -> str:
        raw = self.take(self.u64(what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise _DamagedError(f"{what} is not UTF-8") from error

    def name(self, what: str) -> str:
        """A key or a tensor's name: it may be shown to people."""
        name = self.text(what)
        if not name.isprintable():
            raise _DamagedError(f"{what} is {name[:40]!r}")
        return name

    def texts(self, count: int, what: str) -> tuple[str, ...]:
        """Many at once, without a call per element: a vocabulary holds hundreds of thousands."""
        view, position, end = self._view, self.position, len(self._view)
        unpack, found = _LENGTH.unpack_from, []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(view, position)[0]
                if position > end:
                    raise _DamagedError(f"{what} reaches beyond the end")
                found.append(str(view[start:position], "utf-8"))
        except (struct.error, UnicodeDecodeError) as error:
            raise _DamagedError(f"{what} holds text that cannot be read") from error
        self.position = position
        return tuple(found)


def _parse(path: Path, content: np.ndarray) -> GGUFFile:
    cursor = _Cursor(content)
    if bytes(cursor.take(4, "the magic")) != MAGIC:
        raise _DamagedError("it does not begin with 'GGUF'")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        raise _DamagedError(f"its version is {version}, and {VERSIONS[0]} and {VERSIONS[1]} (little endian) are read")
    num_tensors = cursor.count("tensors", _MIN_TENSOR_BYTES)
    num_entries = cursor.count("metadata entries", _MIN_ENTRY_BYTES)
    entries = [_entry(cursor) for _ in range(num_entries)]
    _refuse_repeated([key for key, _ in entries], path, "metadata key")
    metadata = dict(entries)
    descriptions = [_description(cursor) for _ in range(num_tensors)]
    _refuse_repeated([description.name for description in descriptions], path, "tensor")
    alignment = _alignment(metadata)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = tuple(description.locate(content, data_start, alignment) for description in descriptions)
    return GGUFFile(path, metadata, tensors)


def _refuse_repeated(names: list[str], path: Path, what: str) -> None:
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ModelError(f"{path} holds the {what} {repeated} twice.")


def _entry(cursor: _Cursor) -> tuple[str, MetadataValue]:
    key = cursor.name("a metadata key")
    return key, _value(cursor, cursor.u32(f"the type of {key}"), key)


def _value(cursor: _Cursor, kind: int, key: str) -> MetadataValue:
    if kind == _TEXT:
        return cursor.text(key)
    if kind == _ARRAY:
        return _array(cursor, key)
    if kind not in _NUMBERS:
        raise _DamagedError(f"{key} has the unknown type {kind}")
    value = cursor.number(_NUMBERS[kind], key)
    return bool(value) if kind == _BOOL else value


def _array(cursor: _Cursor, key: str) -> MetadataValue:
    kind = cursor.u32(f"the type of {key}")
    if kind == _TEXT:
        return cursor.texts(cursor.count(f"elements of {key}", 8), key)
    if kind not in _NUMBERS:
        raise _DamagedError(f"{key} is an array of the type {kind}, which is not read here")
    dtype = _NUMBERS[kind]
    count = cursor.count(f"elements of {key}", dtype.itemsize)
    return np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)


@dataclass(frozen=True, slots=True)
class _Description:
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int

    def locate(self, content: np.ndarray, data_start: int, alignment: int) -> GGUFTensor:
        """The tensor's bytes in the file. Type and shape are checked here, where the message can name the tensor."""
        kind = tensor_type(self.type_id)
        if kind is None:
            names = ", ".join(known.name for known in READABLE_TYPES)
            raise _DamagedError(f"it stores {self.name} as {type_name(self.type_id)}; what is read are {names}")
        if self.shape[-1] % kind.block_values:
            raise _DamagedError(
                f"a row of {self.name} has {self.shape[-1]} values, no multiple of {kind.name}'s blocks"
            )
        if self.offset % alignment:
            raise _DamagedError(f"the tensor {self.name} does not lie at a multiple of {alignment} bytes")
        num_bytes = prod(self.shape) // kind.block_values * kind.block_bytes
        start = data_start + self.offset
        if start + num_bytes > content.size:
            raise _DamagedError(f"the tensor {self.name} ends at byte {start + num_bytes} of {content.size}")
        return GGUFTensor(self.name, self.shape, kind, content[start : start + num_bytes])


def _description(cursor: _Cursor) -> _Description:
    name = cursor.name("a tensor's name")
    num_dimensions = cursor.u32(f"the dimensions of {name}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise _DamagedError(f"the tensor {name} has {num_dimensions} dimensions")
    sizes = [cursor.u64(f"the shape of {name}") for _ in range(num_dimensions)]
    if 0 in sizes:
        raise _DamagedError(f"the tensor {name} has a dimension of 0")
    return _Description(name, tuple(reversed(sizes)), cursor.u32(f"the type of {name}"), cursor.u64("an offset"))


def _alignment(metadata: dict[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise _DamagedError(f"general.alignment is {alignment!r}, which is no power of two from 8 on")
    return alignment
