"""A model read from GGUF computes what the model computed that was written into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvcache.errors import ModelError
from kvcache.spec import KVCacheSpec
from tests.unit.workers.gguf_models import round_matrices, write_model
from workers.model import gguf_checkpoint
from workers.model.checkpoint import describe_checkpoint
from workers.model.gguf_file import GGUFFile, read_gguf
from workers.model.gguf_types import READABLE_TYPES, TensorType
from workers.model.gguf_weights import load_gguf_model
from workers.model.runner import choose_step_model
from workers.model.transformers_model import load_model

TOKENS = ["<end>", "a", "b", "ab", *(f"token-{index}" for index in range(56))]
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA2: dict[str, Any] = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}

MODELS: dict[str, tuple[str, PretrainedConfig, dict[str, Any]]] = {
    "llama": ("llama", LlamaConfig(**SIZES, rms_norm_eps=1e-5), {}),
    "llama, tied": ("llama", LlamaConfig(**SIZES, tie_word_embeddings=True), {}),
    "llama, wide heads": ("llama", LlamaConfig(**SIZES, head_dim=16), {}),
    "llama, linear": (
        "llama",
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "mistral": ("llama", MistralConfig(**SIZES, sliding_window=None), {}),
    "qwen2": ("qwen2", Qwen2Config(**SIZES), {}),
    "qwen2, yarn": (
        "qwen2",
        Qwen2Config(**SIZES, rope_parameters=YARN),
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
    ),
    "qwen3": ("qwen3", Qwen3Config(**SIZES, head_dim=16), {}),
    "phi3": ("phi3", Phi3Config(**SIZES), {}),
    "phi3, window": ("phi3", Phi3Config(**SIZES, sliding_window=4), {"attention.sliding_window": 4}),
    "gemma2": ("gemma2", Gemma2Config(**GEMMA2), {"attention.sliding_window": 4}),
    "gemma3": (
        "gemma3",
        Gemma3TextConfig(**GEMMA2, sliding_window_pattern=2, rope_parameters=GEMMA3_ROPE),
        {"attention.sliding_window": 4, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
}


def make_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(3)
    config._attn_implementation = "eager"
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # they begin as ones and zeros, which would hide what is lost
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def read_back(file: Path) -> Any:
    return load_gguf_model(file, torch.float32, "eager", lambda _part: None).eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(40).unsqueeze(0)).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_gguf_gives_the_logits_of_its_source(tmp_path: Path, name: str) -> None:
    architecture, config, more = MODELS[name]
    if name == "gemma3":  # with six layers its own pattern has one that sees everything
        config.num_hidden_layers = 6
        config.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    model = make_model(config)
    write_model(tmp_path / "model.gguf", model, architecture, TOKENS, more=more)
    # Gemma's norms are stored with 1 added, which rounds them.
    torch.testing.assert_close(logits(read_back(tmp_path / "model.gguf")), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", READABLE_TYPES, ids=lambda kind: kind.name)
def test_a_model_of_any_type_gives_the_logits_of_what_it_was_rounded_to(tmp_path: Path, kind: TensorType) -> None:
    wide = SIZES | {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}  # blocks of 256 values
    model = make_model(LlamaConfig(**wide))
    before = logits(model)
    stored_type = gguf.GGMLQuantizationType[kind.name]
    raw = round_matrices(model, stored_type)
    expected = logits(model)
    assert torch.equal(expected, before) == (kind.name == "F32")
    write_model(tmp_path / "model.gguf", model, "llama", TOKENS, raw=raw, kind=stored_type)
    kinds = {tensor.name: tensor.kind for tensor in read_gguf(tmp_path / "model.gguf").tensors}
    assert kinds["blk.1.attn_q.weight"] == kinds["token_embd.weight"] == kind
    torch.testing.assert_close(logits(read_back(tmp_path / "model.gguf")), expected, rtol=1e-5, atol=1e-5)


def test_divisors_of_rotary_frequencies_are_those_of_llama_3(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    scaled, plain = make_model(LlamaConfig(**SIZES, rope_parameters=rope)), make_model(LlamaConfig(**SIZES))
    divisors = plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
    assert len(set(divisors.tolist())) > 1
    write_model(tmp_path / "model.gguf", scaled, "llama", TOKENS, divisors=divisors.numpy())
    torch.testing.assert_close(logits(read_back(tmp_path / "model.gguf")), logits(scaled), rtol=1e-4, atol=1e-4)


def test_float32_weights_are_the_mapped_file(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", make_model(LlamaConfig(**SIZES)), "llama", TOKENS)
    weight = read_back(tmp_path / "model.gguf").model.layers[0].mlp.up_proj.weight
    address = weight.data_ptr()
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.gguf" in line]
    bounds = [[int(end, 16) for end in fields[0].split("-")] for fields in ranges]
    assert any(start <= address < end for start, end in bounds)


def test_the_description_is_that_of_the_source(tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**SIZES))
    write_model(tmp_path / "model.gguf", model, "llama", TOKENS)
    info = describe_checkpoint(tmp_path / "model.gguf", device="cpu")
    assert (info.architecture, info.num_layers, info.num_kv_heads, info.head_size) == ("LlamaForCausalLM", 2, 2, 8)
    assert (info.vocab_size, info.max_position_embeddings, info.dtype) == (len(TOKENS), 128, "float32")
    assert info.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"rope.scaling.type": "longrope"}, "'longrope'"),
        ({"rope.dimension_count": 4}, "rotates 4 of 8"),
        ({"attention.value_length": 4}, "different sizes"),
        ({"attention.head_count": 0}, "head_count"),
        ({"block_count": 1 << 30}, "too few for 1073741824 layers"),
        ({"block_count": 1}, "beyond its 1 layers"),
        ({"embedding_length": 64, "attention.key_length": 8}, "token_embd.weight of shape"),
        ({"context_length": "long"}, "context_length"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], reason: str
) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, make_model(LlamaConfig(**SIZES)), "llama", TOKENS)
    change_metadata(monkeypatch, more)
    with pytest.raises(ModelError, match=reason):
        gguf_checkpoint.open_gguf(file)


def change_metadata(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    """Every file says this of its model, too."""
    changed = {f"llama.{key}": value for key, value in more.items()}

    def with_changes(path: Path) -> GGUFFile:
        found = read_gguf(path)
        return GGUFFile(path, {**found.metadata, **changed}, found.tensors)

    monkeypatch.setattr(gguf_checkpoint, "read_gguf", with_changes)


def test_what_transformers_refuses_is_one_sentence(tmp_path: Path) -> None:
    """Three heads of 8 are no 32 wide model to it, though every tensor fits them."""
    file = tmp_path / "model.gguf"
    config = LlamaConfig(**SIZES, head_dim=8)
    config.num_attention_heads, config.num_key_value_heads = 3, 1
    write_model(file, make_model(config), "llama", TOKENS)
    with pytest.raises(
        ModelError, match=r"model\.gguf describes a model that transformers cannot use: .*heads"
    ) as caught:
        describe_checkpoint(file, device="cpu")
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_named_and_so_is_their_file(tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**SIZES, head_dim=16))
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    write_model(tmp_path / "damaged.gguf", model, "llama", TOKENS)
    loaded = load_model(tmp_path / "damaged.gguf", "float32")
    with pytest.raises(ModelError, match=r"weight model\.norm\.weight in damaged\.gguf has values that are not finite"):
        choose_step_model(loaded, KVCacheSpec(2, 2, 16, 16, "float32"), 64, 1)


@pytest.mark.parametrize("divisors", [np.zeros(4), np.ones(3), np.array([1, 1, 1, np.nan])])
def test_divisors_that_make_no_sense_are_refused(tmp_path: Path, divisors: np.ndarray) -> None:
    write_model(tmp_path / "model.gguf", make_model(LlamaConfig(**SIZES)), "llama", TOKENS, divisors=divisors)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        read_back(tmp_path / "model.gguf")
