"""What a token costs a model: read from the weight files' headers, for the scheduler's predictions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcache.spec import DTYPE_BYTES, KVCacheSpec
from scheduler.types import ModelShape
from workers.model.safetensors_file import TensorHeader

if TYPE_CHECKING:
    from workers.model.checkpoint import CheckpointInfo  # which counts with this module

# Quantized weights with their scales: a bfloat16 per 64, or with a bfloat16 minimum per 32.
WEIGHT_BYTES: dict[str, float] = {**DTYPE_BYTES, "int8": 1 + 2 / 64, "int4": 1 / 2 + 4 / 32}
HEAD_BYTES = {**WEIGHT_BYTES, "int4": WEIGHT_BYTES["int8"]}
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Elements of the matrices in the layers. They differ where a token goes to some of many experts."""

    held: int
    used: int  # by one token


def count_layer_weights(headers: Iterable[TensorHeader], config: Any) -> LayerWeights:
    """``config`` is that of ``transformers``, which says how many experts a token goes to."""
    held = used = 0.0
    share = _expert_share(config)
    for header in headers:
        # Inside the layers a tensor's name holds the layer's number: model.layers.7.mlp.up_proj.weight.
        parts = header.name.split(".")
        if len(header.shape) > 1 and any(part.isdecimal() for part in parts):
            held += header.num_elements
            used += header.num_elements * (share if "experts" in parts else 1)
    return LayerWeights(round(held), round(used))


def count_experts(config: Any) -> int | None:
    """Of each layer, by the configuration of ``transformers``; None where there are none."""
    return next((count for name in _EXPERT_COUNTS if (count := getattr(config, name, None))), None)


def _expert_share(config: Any) -> float:
    num_experts = count_experts(config)
    chosen = getattr(config, "num_experts_per_tok", None)
    return float(chosen / num_experts) if chosen and num_experts else 1.0


def model_shape(checkpoint: CheckpointInfo, spec: KVCacheSpec, quantization: str = "none") -> ModelShape:
    """For a model that is computed as the worker's options say. A step is taken to read every expert."""
    weight_format = checkpoint.dtype if quantization == "none" else quantization
    head_weights = checkpoint.vocab_size * checkpoint.hidden_size
    attention_width = checkpoint.num_layers * checkpoint.num_attention_heads * checkpoint.head_size
    return ModelShape(
        num_layers=checkpoint.num_layers,
        weight_bytes=checkpoint.layer_weights.held * WEIGHT_BYTES[weight_format],
        head_bytes=head_weights * HEAD_BYTES[weight_format],
        linear_flops=2.0 * checkpoint.layer_weights.used,
        head_flops=2.0 * head_weights,
        attention_flops=4.0 * attention_width,  # a multiply-add for the score and one for the value
        kv_token_bytes=spec.token_bytes,
    )
