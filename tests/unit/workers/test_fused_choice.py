"""Which models run in the native decoder: by their structure, and by their logits when they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from kvcache.errors import ModelError
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from tests.unit.workers.native_builds import BUILDS, needs_build
from tests.unit.workers.native_models import (
    CALM,
    CONFIGS,
    SEQUENCE_LENGTH,
    SHAPE,
    logits_of_steps,
    make_model,
    spec_of,
    steps,
)
from workers.model import runner
from workers.model.attention_layers import LayerAttention, read_attention_layers
from workers.model.comparison import COMPARED_TOKENS
from workers.model.fused_decoder import FusedDecoder, find_misfit
from workers.model.narrow_model import find_other_structure
from workers.model.runner import choose_step_model
from workers.model.transformers_model import TransformersModel, load_model


def test_kv_that_the_native_decoder_does_not_have_runs_through_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    spec, exact = spec_of(config, "float16"), spec_of(config)
    step_model = choose_step_model(model, spec, 64, 1)
    assert isinstance(step_model, TransformersModel)
    if BUILDS:
        assert "not float16" in caplog.text
    plan = steps(spec.block_size)[0]
    expected = step_model.logits(plan, PagedStorage(exact, 60))
    torch.testing.assert_close(
        step_model.logits(plan, PagedStorage(spec, 60)), expected, rtol=0, atol=0.02 * float(expected.abs().max())
    )


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_model_that_does_not_fit_cannot_be_quantized(tmp_path: Path, quantization: str) -> None:
    config = GemmaConfig(**SHAPE | {"num_attention_heads": 4})
    model = make_model(tmp_path, config)
    with pytest.raises(ModelError, match=quantization):
        choose_step_model(model, spec_of(config), 64, 1, quantization)


MISFITS: dict[str, tuple[Callable[[], PreTrainedConfig], str, str]] = {
    "gelu": (lambda: LlamaConfig(**SHAPE | {"num_attention_heads": 4}, hidden_act="gelu"), "float32", "SiLU"),
    "KV dtype": (lambda: LlamaConfig(**SHAPE | {"num_attention_heads": 4}), "float16", "KV is"),
    "dtype": (lambda: LlamaConfig(**SHAPE | {"num_attention_heads": 4, "dtype": "float16"}), "int8", "weights are"),
    "norm": (lambda: GemmaConfig(**SHAPE | {"num_attention_heads": 4}), "float32", "GemmaRMSNorm"),
    "part of each head turned": (
        lambda: Phi3Config(
            **SHAPE | {"num_attention_heads": 4, "hidden_size": 128, "pad_token_id": 0}, partial_rotary_factor=0.5
        ),
        "float32",
        "turns a part of each head only",
    ),
    "head size": (lambda: LlamaConfig(**SHAPE | {"num_attention_heads": 4, "head_dim": 24}), "float32", "24"),
    "mlp bias": (lambda: LlamaConfig(**SHAPE | {"num_attention_heads": 4}, mlp_bias=True), "float32", "MLP has biases"),
    "mixture of experts": (
        lambda: Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        "float32",
        "MLP has the parts ['experts', 'gate']",
    ),
    "no rotary embedding in a layer": (
        lambda: SmolLM3Config(
            **SHAPE | {"num_attention_heads": 4, "hidden_size": 128}, no_rope_layers=[1, 0], pad_token_id=0
        ),
        "float32",
        "some layers have no rotary embedding",
    ),
    "soft-capped logits": (
        lambda: LlamaConfig(**SHAPE | {"num_attention_heads": 4}, final_logit_softcapping=30.0),
        "float32",
        "logits are soft-capped",
    ),
    "another structure": (
        lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64),
        "float32",
        "list of decoder layers",
    ),
}


@needs_build
@pytest.mark.parametrize("name", MISFITS)
def test_a_model_that_does_not_fit_is_named_and_left_to_transformers(tmp_path: Path, name: str) -> None:
    make_config, dtype, reason = MISFITS[name]
    config: Any = make_config()
    model = AutoModelForCausalLM.from_config(config)
    spec = spec_of(config, dtype) if name != "another structure" else KVCacheSpec(1, 2, 16, 16, dtype)
    assert reason in (find_misfit(model, spec, read_attention_layers(model, 64)) or "")


@needs_build
@pytest.mark.parametrize(("max_model_len", "expected"), [(40, FusedDecoder), (41, TransformersModel)])
def test_a_window_wider_than_the_compared_steps_is_not_overlooked(
    tmp_path: Path, max_model_len: int, expected: type
) -> None:
    """Steps as short as those compared at load give the same with and without it."""
    config = MistralConfig(**SHAPE | {"num_attention_heads": 4}, sliding_window=40)
    assert COMPARED_TOKENS < 40
    model = make_model(tmp_path, config)
    assert isinstance(choose_step_model(model, spec_of(config), max_model_len, 1), expected)


@needs_build
def test_soft_capped_attention_scores_are_not_overlooked(tmp_path: Path) -> None:
    """Far above the scores a cap changes less than rounding."""
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    layers = [LayerAttention(), LayerAttention(softcap=50.0)]
    assert "soft-capped" in (find_misfit(model, spec_of(config), layers) or "")


@needs_build
@pytest.mark.parametrize(("attribute", "reason"), [("inv_freq", "turns a part"), ("other", "differs from layer")])
def test_a_rotary_embedding_of_another_kind_is_not_overlooked(tmp_path: Path, attribute: str, reason: str) -> None:
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    model.model.rotary_emb = torch.nn.Module()
    model.model.rotary_emb.register_buffer(attribute, torch.ones(4))
    assert reason in (find_misfit(model, spec_of(config), [LayerAttention()]) or "")


@needs_build
def test_a_model_that_only_looks_alike_is_found_out_at_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Granite has Llama's modules, but multiplies embeddings, residuals and logits by numbers of its own."""
    config = GraniteConfig(**SHAPE | {"num_attention_heads": 4, "hidden_size": 128}, residual_multiplier=0.5)
    model = make_model(tmp_path, config)
    assert find_misfit(model, spec_of(config), read_attention_layers(model, 64)) is None
    assert isinstance(choose_step_model(model, spec_of(config), 64, 1), TransformersModel)
    assert "logits differ" in caplog.text


def test_weights_are_given_back_while_they_are_packed(tmp_path: Path, build: str) -> None:
    config = CONFIGS["llama"]()
    model, kept = make_model(tmp_path, config), load_model(tmp_path, "float32")
    parts: list[float] = []

    def reload() -> nn.Module:
        raise AssertionError("the packed model fits")

    packed = choose_step_model(model, spec_of(config), SEQUENCE_LENGTH, 1, reload=reload, report=parts.append)
    assert isinstance(packed, FusedDecoder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    assert parts == sorted(parts) and parts[-1] == 1.0 and len(parts) > config.num_hidden_layers
    spec = spec_of(config)
    kept_packed = choose_step_model(kept, spec, SEQUENCE_LENGTH, 1)
    expected, found = logits_of_steps(kept_packed, spec), logits_of_steps(packed, spec)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@needs_build
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_was_packed_in_vain_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Only its logits show what is wrong, as if its structure were ours."""
    monkeypatch.setattr(runner, "find_other_structure", lambda *_: None)
    config = GraniteConfig(**SHAPE | {"num_attention_heads": 4, "hidden_size": 128}, residual_multiplier=0.5)
    make_model(tmp_path, config)
    model, kept = load_model(tmp_path, dtype), load_model(tmp_path, dtype)
    spec = spec_of(config)
    chosen = choose_step_model(model, spec, 64, 1, reload=lambda: load_model(tmp_path, dtype))
    assert sum(parameter.numel() for parameter in model.parameters()) == 0
    expected, found = logits_of_steps(TransformersModel(kept), spec), logits_of_steps(chosen, spec)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@needs_build
@pytest.mark.parametrize(
    "multiplier",
    [
        {"residual_multiplier": 0.5},
        {"residual_multiplier": 0.7},
        {"embedding_multiplier": 1.1},
        {"logits_scaling": 1.25},
        {"logits_scaling": 1.04},
    ],
    ids=lambda multiplier: " ".join(f"{name} {value}" for name, value in multiplier.items()),
)
@pytest.mark.parametrize(
    ("dtype", "quantization", "kv_dtype"),
    [
        ("float32", "none", "int8"),
        ("float32", "none", "fp8"),
        ("bfloat16", "none", "bfloat16"),
        ("float32", "int8", "float32"),
        ("float32", "int4", "float32"),
    ],
)
def test_rounding_does_not_hide_another_structure(
    tmp_path: Path, dtype: str, quantization: str, kv_dtype: str, multiplier: dict[str, float]
) -> None:
    config = GraniteConfig(**SHAPE | CALM, **multiplier)
    make_model(tmp_path, config)
    model, spec = load_model(tmp_path, dtype), spec_of(config, kv_dtype)
    assert find_misfit(model, spec, read_attention_layers(model, 64)) is None
    if quantization == "none":
        assert isinstance(choose_step_model(model, spec, 64, 1), TransformersModel)
    else:
        with pytest.raises(ModelError, match="logits differ"):
            choose_step_model(model, spec, 64, 1, quantization)


@needs_build
def test_multipliers_of_one_are_no_other_structure(tmp_path: Path) -> None:
    config = GraniteConfig(**SHAPE | CALM, attention_multiplier=0.3)  # the scale of attention is the module's own
    model = make_model(tmp_path, config)
    assert isinstance(choose_step_model(model, spec_of(config), 64, 1, "int4"), FusedDecoder)


@needs_build
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 1), (6, 2)])
def test_a_structure_is_looked_at_whatever_the_weights_are(tmp_path: Path, num_heads: int, num_kv_heads: int) -> None:
    """Weights of zero hide all that a layer does."""
    shape = SHAPE | {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_size": 96,
        "initializer_range": 0.0,
    }
    found = []
    for multiplier in (1.0, 0.99):
        config = GraniteConfig(**shape, residual_multiplier=multiplier)
        found.append(find_other_structure(make_model(tmp_path, config), spec_of(config), 1))
    assert found[0] is None and "logits differ" in str(found[1])


@needs_build
def test_a_model_of_which_no_small_copy_can_be_made_is_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    init = type(model).__init__

    def refuse_narrow(self: Any, config: Any) -> None:
        if config.hidden_size % 128:
            raise ValueError("a width of 128 is needed")
        init(self, config)

    monkeypatch.setattr(type(model), "__init__", refuse_narrow)
    assert isinstance(choose_step_model(model, spec_of(config), 64, 1), TransformersModel)
    assert "no small copy of it to compare: a width of 128 is needed" in caplog.text


def test_without_a_native_build_transformers_serves(
    tmp_path: Path, choose_library_again: Callable[[Collection[str]], None]
) -> None:
    choose_library_again([])
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    assert isinstance(choose_step_model(model, spec_of(config), 64, 1), TransformersModel)


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("float32", "int8")])
def test_one_warning_says_that_weights_are_widened_where_instructions_are_missing(
    tmp_path: Path, build: str, caplog: pytest.LogCaptureFixture, dtype: str, quantization: str
) -> None:
    config = LlamaConfig(**SHAPE | CALM)
    make_model(tmp_path, config)
    choose_step_model(load_model(tmp_path, dtype), spec_of(config), 64, 1, quantization)
    needed = {"bfloat16": "bf16", "int8": "vnni"}.get(dtype if quantization == "none" else quantization)
    warnings = [message for message in caplog.messages if "about as long as in float32" in message]
    assert len(warnings) == (needed is not None and needed not in build)
    assert all(f"avx512_{needed}" in warning for warning in warnings)
