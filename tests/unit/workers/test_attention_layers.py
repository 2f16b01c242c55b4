"""What a loaded model's layers ask for is found in its calls, whatever its configuration says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    GptOssConfig,
    Llama4TextConfig,
    PhimoeConfig,
    PreTrainedConfig,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from kvcache.errors import ModelError
from kvcache.spec import KVCacheSpec
from tests.families import FAMILIES, SHAPE, gemma2, gemma3, llama, mistral
from workers.model.attention_layers import LayerAttention, own_logits, read_attention_layers
from workers.model.runner import choose_step_model

VOCAB_SIZE = 97


def model_of(config: PreTrainedConfig) -> Any:
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(config).eval()


def test_windows_and_soft_capping_are_read_for_each_layer() -> None:
    local, whole = LayerAttention(window=22, softcap=1.5), LayerAttention(softcap=1.5)
    assert read_attention_layers(model_of(gemma2()(VOCAB_SIZE)), 100) == (local, whole, local, whole)


def test_a_window_that_only_the_mask_shows_is_found() -> None:
    """Phi-3.5-MoE does not tell its attention function about the window."""
    config = PhimoeConfig(**SHAPE, vocab_size=VOCAB_SIZE, num_local_experts=4, sliding_window=9)
    assert {layer.window for layer in read_attention_layers(model_of(config), 100)} == {9}


@pytest.mark.parametrize(("max_model_len", "window"), [(21, None), (22, None), (23, 22), (512, 22)])
def test_a_window_counts_only_where_a_sequence_can_be_longer(max_model_len: int, window: int | None) -> None:
    layers = read_attention_layers(model_of(mistral(22)(VOCAB_SIZE)), max_model_len)
    assert {layer.window for layer in layers} == {window}


REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "sinks": (GptOssConfig(**SHAPE, vocab_size=VOCAB_SIZE, num_local_experts=4), "attention sinks"),
    "chunks": (
        Llama4TextConfig(
            **SHAPE, vocab_size=VOCAB_SIZE, attention_chunk_size=16, intermediate_size_mlp=32, num_local_experts=2
        ),
        "mask is neither causal nor a sliding window",
    ),
    "both directions": (
        gemma3(use_bidirectional_attention=True)(VOCAB_SIZE),
        "mask is neither causal nor a sliding window",
    ),
    "latent attention": (
        DeepseekV3Config(
            hidden_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=VOCAB_SIZE
        ),
        "keys and values of DeepseekV3ForCausalLM differ in shape",
    ),
    "two calls": (DiffLlamaConfig(**SHAPE, vocab_size=VOCAB_SIZE), "once in each of its layers"),
    "no interface": (BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=VOCAB_SIZE), "cannot be replaced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_paged_attention_does_not_do_is_refused_by_name(name: str) -> None:
    config, reason = REFUSED[name]
    model = model_of(config)
    usual = model.config._attn_implementation
    with pytest.raises(ModelError, match=reason):
        read_attention_layers(model, 100)
    assert model.config._attn_implementation == usual


@pytest.mark.parametrize("name", ["gemma2", "mixtral, window 13"])
def test_a_model_has_its_own_attention_again_afterwards(name: str) -> None:
    model = model_of(FAMILIES[name](VOCAB_SIZE))
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    before = model(torch.tensor([tokens]), use_cache=False).logits[0]
    read_attention_layers(model, 100)
    torch.testing.assert_close(own_logits(model, tokens), before)
    assert torch.equal(model(torch.tensor([tokens]), use_cache=False).logits[0], before)


def test_attention_that_differs_in_code_is_found_by_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose own attention looks one token back only in the keys' place: no call shows it."""
    eager = modeling_llama.eager_attention_forward

    def shifted(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return eager(module, query, key.roll(1, dims=2), *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", shifted)
    model = model_of(llama({"rope_type": "default"})(VOCAB_SIZE))
    spec = KVCacheSpec(num_layers=4, num_kv_heads=2, head_size=16, block_size=16, dtype="float32")
    model.set_attn_implementation("twinpool_paged")
    with pytest.raises(ModelError, match="does not give its own results with paged attention"):
        choose_step_model(model, spec, 100, 1)


def test_a_mask_that_depends_on_the_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def blockwise(**kwargs: Any) -> Any:
        return create_causal_mask(**kwargs, block_sequence_ids=torch.tensor([[0, 0]]))

    monkeypatch.setattr(modeling_llama, "create_causal_mask", blockwise)
    with pytest.raises(ModelError, match="depends on more than positions"):
        read_attention_layers(model_of(llama({"rope_type": "default"})(VOCAB_SIZE)), 100)
