"""Finds the build of the native decoder that this processor can run."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np

from kvcache.errors import ResourceError
from workers.native.processor import processor_flags

INTERFACE = 10  # grows with every change of what decoder.cpp and this file agree on

# Best first: name of the build (see setup.py) and the processor flags that it needs.
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
BUILDS = (
    ("decoder_avx512_vnni_bf16", _AVX512 | {"avx512_vnni", "avx512_bf16"}),
    ("decoder_avx512_vnni", _AVX512 | {"avx512_vnni"}),
    ("decoder_avx512", _AVX512),
    ("decoder_avx2", frozenset({"avx2", "fma", "bmi2", "f16c"})),
)
# What multiplies weights of a format as they are; without it they are widened first.
INSTRUCTIONS = {"bfloat16": "avx512_bf16", "int8": "avx512_vnni", "int4": "avx512_vnni"}


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The fastest build that is installed and that this processor can run; None where there is none.

    Raises:
        ResourceError: the build is not of this version's source.
    """
    name = chosen_build()
    path = path_of(name) if name is not None else None
    return _declare(path) if path is not None else None


def chosen_build() -> str | None:
    """Of those that are installed, the first that this processor can run."""
    flags = processor_flags()
    names = (name for name, needed in BUILDS if needed <= flags and path_of(name) is not None)
    return next(names, None)


def missing_instructions(weight_format: str) -> str | None:
    """Which of ``INSTRUCTIONS`` the chosen build lacks for these weights; None where it has what they need."""
    needed = INSTRUCTIONS.get(weight_format)
    has = dict(BUILDS).get(chosen_build() or "", frozenset())
    return needed if needed not in has else None


def path_of(name: str) -> Path | None:
    """The file of a build; None where it is not installed."""
    # Found as the import system finds an extension module, though it is none: it is called through ctypes.
    found = importlib.util.find_spec(f"workers.native.{name}")
    return Path(found.origin) if found is not None and found.origin is not None else None


class Shape(ctypes.Structure):
    """``TwinpoolShape`` of decoder.cpp."""

    _fields_ = [
        ("num_layers", ctypes.c_int32),
        ("hidden_size", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("intermediate_size", ctypes.c_int32),
        ("vocab_size", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("norm_epsilon", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("weight_format", ctypes.c_int32),
        ("cache_format", ctypes.c_int32),
        ("first_token", ctypes.c_int32),
    ]


class Group(ctypes.Structure):
    """``TwinpoolGroup``."""

    _fields_ = [
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("round", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_int32),
        ("memory", ctypes.c_void_p),
    ]


class Parts(ctypes.Structure):
    """``TwinpoolParts``: what a step's time goes to, in nanoseconds. A step adds to it."""

    _fields_ = [(name, ctypes.c_int64) for name in ("embedding", "attention", "linears", "norms", "head")]


# ``TwinpoolSequence``: many at once are cheaper to make as an array than as ctypes structures.
SEQUENCE = np.dtype(
    [
        ("first_row", np.int32),
        ("num_rows", np.int32),
        ("start", np.int32),
        ("reserved", np.int32),
        ("block_table", np.uintp),
    ]
)


# ``TwinpoolDraw``
DRAW = np.dtype(
    [
        ("logits", np.uintp),
        ("likeliest", np.int64),
        ("top_k", np.int64),
        ("token", np.int64),
        ("top_p", np.float64),
        ("threshold", np.float64),
        ("temperature", np.float32),
        ("lowest", np.float32),
    ]
)


class Step(ctypes.Structure):
    """``TwinpoolStep``."""

    _fields_ = [
        ("num_rows", ctypes.c_int64),
        ("num_sequences", ctypes.c_int64),
        ("num_sampled", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("sampled_rows", ctypes.c_void_p),
        ("cache_layers", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("likeliest", ctypes.c_void_p),
        ("layers_done", ctypes.c_void_p),
        ("wake_fd", ctypes.c_int64),
        ("group", ctypes.POINTER(Group)),
        ("parts", ctypes.POINTER(Parts)),
    ]


def _declare(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    if getattr(library, "twinpool_interface", lambda: None)() != INTERFACE:
        raise ResourceError(f"{path.name} was built from another version of decoder.cpp; install Twinpool again.")
    library.twinpool_draw_bytes.argtypes = [ctypes.c_int64]
    library.twinpool_draw_bytes.restype = ctypes.c_int64
    library.twinpool_draw.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int]
    library.twinpool_draw.restype = None
    library.twinpool_multiply.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    library.twinpool_multiply.restype = ctypes.c_int64
    library.twinpool_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.twinpool_read.restype = ctypes.c_float
    library.twinpool_create.argtypes = [ctypes.POINTER(Shape)]
    library.twinpool_create.restype = ctypes.c_void_p
    library.twinpool_destroy.argtypes = [ctypes.c_void_p]
    library.twinpool_destroy.restype = None
    library.twinpool_set_linear.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
    ]
    library.twinpool_set_linear.restype = ctypes.c_int
    library.twinpool_set_vector.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int64,
    ]
    library.twinpool_set_vector.restype = None
    library.twinpool_group_bytes.argtypes = [ctypes.c_int]
    library.twinpool_group_bytes.restype = ctypes.c_int64
    library.twinpool_step.argtypes = [ctypes.c_void_p, ctypes.POINTER(Step), ctypes.c_int]
    library.twinpool_step.restype = ctypes.c_int
    return library
