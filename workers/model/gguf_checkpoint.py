"""A model in GGUF as ``transformers`` would describe it: config, names and shapes of weights, tokenizer metadata.

Reads headers only; the weights stay mapped until ``gguf_weights`` asks for them. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvcache.errors import ModelError
from workers.model.gguf_families import (
    EMBEDDING,
    MODEL_TENSORS,
    OUTPUT_HEAD,
    ROTARY_DIVISORS,
    Family,
    Shape,
    expected_shape,
    find_family,
    read_shape,
    rope_parameters,
)
from workers.model.gguf_file import GGUFTensor, read_gguf
from workers.model.gguf_metadata import Metadata
from workers.model.gguf_tokenizer import TokenizerMetadata, end_token_ids, read_tokenizer_metadata
from workers.model.gguf_types import F32
from workers.model.safetensors_file import TensorHeader

_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)")


@dataclass(frozen=True, slots=True)
class GGUFWeight:
    """One tensor under its name in ``transformers``."""

    name: str
    tensor: GGUFTensor


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint:
    """``config`` is what config.json would hold. ``rotary_divisors`` is None where rotary angles follow the config."""

    path: Path
    family: Family
    shape: Shape
    config: dict[str, object]
    eos_token_ids: tuple[int, ...]
    tokenizer: TokenizerMetadata
    weights: tuple[GGUFWeight, ...]
    rotary_divisors: np.ndarray | None

    def headers(self) -> list[TensorHeader]:
        """The weights as a safetensors file with the same content would list them."""
        return [
            TensorHeader(weight.name, weight.tensor.kind.name, weight.tensor.shape, weight.tensor.data.size)
            for weight in self.weights
        ]


def open_gguf(path: Path) -> GGUFCheckpoint:
    """Maps the model; names, shapes and types of all tensors are checked.

    Raises:
        ModelError: with the reason why it cannot be read.
    """
    file = read_gguf(path)
    metadata = Metadata(path, file.metadata)
    family = find_family(metadata)
    shape = read_shape(metadata, family)
    tokenizer = read_tokenizer_metadata(metadata)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    divisors = _rotary_divisors(path, tensors.pop(ROTARY_DIVISORS, None), shape)
    weights = tuple(GGUFWeight(_transformers_name(path, family, name), tensor) for name, tensor in tensors.items())
    _refuse_missing(path, family, shape, {weight.name for weight in weights})
    vocab_size = tensors[EMBEDDING].shape[0]
    _refuse_shapes(path, weights, shape, vocab_size)
    if vocab_size < len(tokenizer.tokens):
        raise ModelError(f"{path} has {len(tokenizer.tokens)} tokens and embeddings for only {vocab_size}.")
    eos_token_ids = end_token_ids(metadata, tokenizer)
    config = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": metadata.positive(f"{family.architecture}.context_length"),
        "rms_norm_eps": metadata.number(f"{family.architecture}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(metadata, family),
        "tie_word_embeddings": OUTPUT_HEAD not in tensors,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **family.own_config(metadata, shape),
    }
    return GGUFCheckpoint(path, family, shape, config, eos_token_ids, tokenizer, weights, divisors)


def _transformers_name(path: Path, family: Family, gguf_name: str) -> str:
    layer = _LAYER_NAME.fullmatch(gguf_name)
    if layer and layer[2] in family.layer_tensors:
        return f"model.layers.{layer[1]}.{family.layer_tensors[layer[2]]}"
    if gguf_name in MODEL_TENSORS:
        return MODEL_TENSORS[gguf_name]
    raise ModelError(f"{path} holds the tensor {gguf_name}, which is not known of the family {family.architecture}.")


def _refuse_missing(path: Path, family: Family, shape: Shape, names: set[str]) -> None:
    expected = {name for gguf_name, name in MODEL_TENSORS.items() if gguf_name != OUTPUT_HEAD}
    # Its own number of layers could be any: no set larger than the file is made from it.
    if shape.num_layers * len(family.layer_tensors) > len(names):
        raise ModelError(f"{path} lacks tensors: {len(names)} are too few for {shape.num_layers} layers.")
    expected |= {
        f"model.layers.{layer}.{name}" for layer in range(shape.num_layers) for name in family.layer_tensors.values()
    }
    if missing := expected - names:
        raise ModelError(f"{path} lacks {len(missing)} tensors of its model, {min(missing)} among them.")
    if extra := names - expected - {MODEL_TENSORS[OUTPUT_HEAD]}:
        raise ModelError(f"{path} holds {min(extra)} beyond its {shape.num_layers} layers.")


def _refuse_shapes(path: Path, weights: tuple[GGUFWeight, ...], shape: Shape, vocab_size: int) -> None:
    for weight in weights:
        found, expected = weight.tensor.shape, expected_shape(weight.name, shape, vocab_size)
        if found != expected:
            raise ModelError(f"{path} has {weight.tensor.name} of shape {found} where {expected} belongs.")


def _rotary_divisors(path: Path, tensor: GGUFTensor | None, shape: Shape) -> np.ndarray | None:
    if tensor is None:
        return None
    if tensor.kind is not F32 or tensor.shape != (shape.head_size // 2,):
        raise ModelError(
            f"{path} has {ROTARY_DIVISORS} of shape {tensor.shape} as {tensor.kind.name}, not one per frequency."
        )
    divisors = tensor.data.view("<f4")
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise ModelError(f"{path} has {ROTARY_DIVISORS} that are not positive numbers.")
    return divisors
