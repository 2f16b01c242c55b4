"""What a token costs a model, counted from the names and shapes of its weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from scheduler.types import ModelShape
from tests.builders import make_spec
from tests.unit.engine.test_startup import CHECKPOINT
from workers.model.safetensors_file import TensorHeader
from workers.model.shape import LayerWeights, count_layer_weights, model_shape


def header(name: str, *shape: int) -> TensorHeader:
    return TensorHeader(name, "F32", shape, 4)


def test_matrices_inside_the_layers_are_counted() -> None:
    headers = [
        header("model.embed_tokens.weight", 100, 8),
        header("model.layers.0.self_attn.q_proj.weight", 8, 8),
        header("model.layers.1.mlp.up_proj.weight", 16, 8),
        header("model.layers.1.input_layernorm.weight", 8),
        header("lm_head.weight", 100, 8),
    ]
    assert count_layer_weights(headers, SimpleNamespace()) == LayerWeights(64 + 128, 64 + 128)


@pytest.mark.parametrize("name", ["num_local_experts", "num_experts", "n_routed_experts"])
def test_a_token_uses_the_experts_that_it_goes_to(name: str) -> None:
    headers = [
        header("model.layers.0.mlp.experts.3.up_proj.weight", 10, 8),
        header("model.layers.0.mlp.shared_expert.up_proj.weight", 5, 8),
    ]
    config = SimpleNamespace(num_experts_per_tok=2, **{name: 8})
    assert count_layer_weights(headers, config) == LayerWeights(held=120, used=40 + 20)


def test_a_shape_follows_from_the_checkpoint_and_the_cache() -> None:
    checkpoint = replace(CHECKPOINT, layer_weights=LayerWeights(held=900, used=300))
    spec = make_spec(num_layers=2, num_kv_heads=3, head_size=4)
    assert model_shape(checkpoint, spec) == ModelShape(
        num_layers=2,
        weight_bytes=3600,
        head_bytes=4 * 100 * 36,
        linear_flops=600,
        head_flops=2 * 100 * 36,
        attention_flops=4 * 2 * 9 * 4,  # for each layer and head, so many multiply-adds for score and value
        kv_token_bytes=2 * 2 * 3 * 4 * 4,
    )


def test_quantized_weights_are_read_faster_and_computed_as_often() -> None:
    plain, int4 = (model_shape(CHECKPOINT, make_spec(), quantization) for quantization in ("none", "int4"))
    assert int4.weight_bytes < plain.weight_bytes / 6 and int4.linear_flops == plain.linear_flops
    assert int4.head_bytes > plain.head_bytes / 4  # which stays in 8 bits
