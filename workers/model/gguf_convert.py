"""A model in GGUF written as the folder that ``transformers`` reads: done once for the default model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from kvcache.errors import ModelError
from workers.model.gguf_checkpoint import GGUFCheckpoint, open_gguf
from workers.model.gguf_tokenizer import write_tokenizer
from workers.model.gguf_weights import read_weight
from workers.model.progress import Progress
from workers.model.safetensors_file import SINGLE_FILE
from workers.model.safetensors_writer import TensorShape, write_float32


def convert_gguf(source: Path, target: Path, progress: Progress) -> None:
    """Writes weights (float32), config and tokenizer of ``source`` into the existing folder ``target``.

    float32 holds every stored value exactly. Raises ModelError for a file that cannot be read, or whose rotary
    frequencies a config cannot say; ``target`` is then incomplete and the caller's to remove. OSError (a full disk) is
    passed on.
    """
    progress.step(f"Reading {source.name} ...")
    checkpoint = open_gguf(source)
    if checkpoint.rotary_divisors is not None:
        raise ModelError(f"{source} has rotary frequencies of its own, which a converted model would lose.")
    write_tokenizer(checkpoint.tokenizer, target, _context_length(checkpoint))
    ids = {name: checkpoint.config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    set_ids = {name: token_id for name, token_id in ids.items() if token_id is not None}
    config = {name: value for name, value in checkpoint.config.items() if name not in ids}
    _write_json(target / "config.json", {**config, "dtype": "float32", **set_ids})
    _write_json(target / "generation_config.json", dict(set_ids))
    progress.step(f"Converting {len(checkpoint.weights)} tensors to float32 ...")
    shapes = [TensorShape(weight.name, weight.tensor.shape) for weight in checkpoint.weights]
    tensors = progress.over(_values(checkpoint), total=len(shapes), label="converting")
    write_float32(target / SINGLE_FILE, shapes, tensors)


def _values(checkpoint: GGUFCheckpoint) -> Iterator[np.ndarray]:
    """Float32 tensors in the file's order, in transformers' row order, one at a time."""
    for weight in checkpoint.weights:
        yield read_weight(checkpoint, weight, torch.float32).numpy()


def _context_length(checkpoint: GGUFCheckpoint) -> int:
    length = checkpoint.config["max_position_embeddings"]
    assert isinstance(length, int)
    return length


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
