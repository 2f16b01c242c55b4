"""A GGUF checkpoint as a loaded ``transformers`` model.

llama.cpp stores the rows of a Llama's query and key projections in another order than transformers, because its
rotary embedding turns neighbouring pairs (2i, 2i+1) where transformers turns halves (i, i + size/2)::

    one head of size 8     transformers   0 1 2 3 | 4 5 6 7
                           GGUF           0 4 1 5 2 6 3 7

``transformers`` has a GGUF path of its own, which takes minutes where whole tensors take seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from kvcache.errors import ModelError
from workers.model.gguf_checkpoint import GGUFCheckpoint, GGUFWeight, open_gguf
from workers.model.gguf_values import read_values


def load_gguf_model(path: Path, dtype: torch.dtype, attention: str, report: Callable[[float], None]) -> nn.Module:
    """The model with its weights in ``dtype``: those that are stored in it stay mapped, the others are copies.

    ``report`` hears after every tensor which part of the file has been read, from 0 to 1.

    Raises:
        ModelError: the file cannot be read, or a tensor has another shape than the model.
    """
    checkpoint = open_gguf(path)
    config = gguf_config(checkpoint)
    state = {}
    total, read = sum(weight.tensor.data.size for weight in checkpoint.weights), 0
    for weight in checkpoint.weights:
        state[weight.name] = read_weight(checkpoint, weight, dtype)
        read += weight.tensor.data.size
        report(read / total)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation=attention
    )
    model.config.name_or_path = str(path)  # as where transformers reads the weights itself
    if checkpoint.rotary_divisors is not None:
        _divide_frequencies(model, torch.from_numpy(checkpoint.rotary_divisors))
    return model


def gguf_config(checkpoint: GGUFCheckpoint) -> PretrainedConfig:
    """Raises ModelError where ``transformers`` refuses what the file says."""
    fields: dict[str, Any] = {name: value for name, value in checkpoint.config.items() if name != "model_type"}
    try:
        return CONFIG_MAPPING[checkpoint.family.model_type](**fields)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{checkpoint.path} describes a model that transformers cannot use: {reason}") from error


def read_weight(checkpoint: GGUFCheckpoint, weight: GGUFWeight, dtype: torch.dtype) -> torch.Tensor:
    """One tensor as ``transformers`` has it."""
    family, shape, name = checkpoint.family, checkpoint.shape, weight.name
    if family.norm_offset and name.endswith("norm.weight"):
        return (read_values(weight.tensor, torch.float32) - family.norm_offset).to(dtype)
    values = read_values(weight.tensor, dtype)
    if family.pairs_rotary_rows and name.endswith("q_proj.weight"):
        return restore_row_order(values, shape.num_heads)
    if family.pairs_rotary_rows and name.endswith("k_proj.weight"):
        return restore_row_order(values, shape.num_kv_heads)
    return values


def restore_row_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a query or key projection back in transformers' order (see the module's picture), as a copy.

    ``weight``: (num_heads * head_size, hidden_size), returned with the same shape.
    """
    num_rows, num_columns = weight.shape
    pairs = weight.view(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.transpose(1, 2).reshape(num_rows, num_columns)


def _divide_frequencies(model: Any, divisors: torch.Tensor) -> None:
    rotary = model.model.rotary_emb
    for name in ("inv_freq", "original_inv_freq"):
        setattr(rotary, name, getattr(rotary, name) / divisors)
