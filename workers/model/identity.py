"""Whether two machines hold the same checkpoint, wherever it lies there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from workers.model.gguf_names import SUFFIX

SMALL_FILES = frozenset({"config.json", "tokenizer.json"})
WEIGHT_SUFFIXES = frozenset({".safetensors", SUFFIX})
NUM_SAMPLES, SAMPLE_BYTES = 32, 1 << 14  # of each file with weights: it is not read whole


def checkpoint_digest(path: Path) -> str:
    """Of a folder's configuration, vocabulary and weights, or of a GGUF file. Takes milliseconds.

    All of the former, and of the weights sizes and samples over the whole length: another model, revision or fine-tune
    differs in them; a few bytes that were damaged may not.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.name in SMALL_FILES:
            digest.update(_framed(file.name.encode()) + _framed(file.read_bytes()))
        elif file.suffix in WEIGHT_SUFFIXES:
            size = file.stat().st_size
            digest.update(b"%d;" % size)  # not the name: a GGUF file's says nothing
            with file.open("rb") as stream:
                _add_samples(digest, stream, size)
    return digest.hexdigest()[:16]


def _add_samples(digest: hashlib._Hash, stream: BinaryIO, size: int) -> None:
    """The first bytes, which are the header, the last, and those at even steps between them."""
    last = max(0, size - SAMPLE_BYTES)
    for number in range(NUM_SAMPLES):
        stream.seek(last * number // (NUM_SAMPLES - 1))
        digest.update(stream.read(SAMPLE_BYTES))


def _framed(data: bytes) -> bytes:
    return b"%d:" % len(data) + data
