"""One tiny model of random weights for each family that runs through transformers, with all that makes it special."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

CONTEXT = 512
NO_SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # so wide that the likeliest token is so by far more than rounding
    **NO_SPECIAL_TOKENS,
}
ROPE: dict[str, Any] = {"rope_theta": 500.0}  # turns far enough in some tokens for a wrong angle to show
SCALED_ROPE = ROPE | {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3_ROPE = SCALED_ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0 + i / 2 for i in range(6)], "long_factor": [8.0] * 6}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
}
TWO_OF_FOUR = ["sliding_attention", "full_attention"] * 2
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def llama(rope: dict[str, Any]) -> Callable[[int], PreTrainedConfig]:
    return lambda vocab_size: LlamaConfig(**SHAPE, vocab_size=vocab_size, rope_parameters=ROPE | rope)


def mistral(window: int | None) -> Callable[[int], PreTrainedConfig]:
    return lambda vocab_size: MistralConfig(**SHAPE, vocab_size=vocab_size, sliding_window=window)


def gemma2(**changed: Any) -> Callable[[int], PreTrainedConfig]:
    special = {
        "sliding_window": 22,
        "layer_types": TWO_OF_FOUR,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 4.0,
        "query_pre_attn_scalar": 40,
    }
    return lambda vocab_size: Gemma2Config(**SHAPE, vocab_size=vocab_size, **special | changed)


def gemma3(**changed: Any) -> Callable[[int], PreTrainedConfig]:
    special = {"sliding_window": 13, "layer_types": TWO_OF_FOUR, "rope_parameters": TWO_ROPES}
    return lambda vocab_size: Gemma3TextConfig(
        **SHAPE, vocab_size=vocab_size, query_pre_attn_scalar=20, **special | changed
    )


def phi3(**special: Any) -> Callable[[int], PreTrainedConfig]:
    # Heads split the hidden size in Phi-3.
    return lambda vocab_size: Phi3Config(**SHAPE | {"head_dim": 12}, vocab_size=vocab_size, **special)


def mixtral(window: int | None) -> Callable[[int], PreTrainedConfig]:
    return lambda vocab_size: MixtralConfig(**SHAPE, vocab_size=vocab_size, num_local_experts=6, sliding_window=window)


# Windows of 3, 13, 16 and 22 tokens: smaller than a block, no multiple of one, a block, and more than one.
FAMILIES: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": llama({"rope_type": "default"}),
    "llama, llama3 rope": llama(LLAMA3_ROPE),
    "llama, linear rope": llama(ROPE | {"rope_type": "linear", "factor": 4.0}),
    "llama, yarn rope": llama(SCALED_ROPE | {"rope_type": "yarn"}),
    "qwen2": lambda vocab_size: Qwen2Config(**SHAPE | {"head_dim": 12}, vocab_size=vocab_size),
    "qwen2, last layers windowed": lambda vocab_size: Qwen2Config(
        **SHAPE | {"head_dim": 12},
        vocab_size=vocab_size,
        use_sliding_window=True,
        sliding_window=13,
        max_window_layers=2,
    ),
    "qwen3": lambda vocab_size: Qwen3Config(**SHAPE, vocab_size=vocab_size),
    "mistral": mistral(None),
    "mistral, window 3": mistral(3),
    "mistral, window 16": mistral(16),
    "mistral, window 22": mistral(22),
    "gemma2": gemma2(),
    "gemma3": gemma3(),
    "phi3": phi3(),
    "phi3, window 22": phi3(sliding_window=22),
    "phi3, longrope": phi3(rope_parameters=ROPE | LONG_ROPE, original_max_position_embeddings=256),
    "gpt2": lambda vocab_size: GPT2Config(
        vocab_size=vocab_size,
        n_embd=48,
        n_layer=3,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.2,
        scale_attn_by_inverse_layer_idx=True,
        **NO_SPECIAL_TOKENS,
    ),
    "opt": lambda vocab_size: OPTConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        word_embed_proj_dim=32,
        ffn_dim=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        init_std=0.2,
        **NO_SPECIAL_TOKENS,
    ),
    "mixtral": mixtral(None),
    "mixtral, window 13": mixtral(13),
    "qwen2-moe, last layers windowed": lambda vocab_size: Qwen2MoeConfig(
        **SHAPE | {"head_dim": 12} | MOE,
        vocab_size=vocab_size,
        shared_expert_intermediate_size=24,
        use_sliding_window=True,
        sliding_window=13,
        max_window_layers=2,
    ),
    "qwen3-moe": lambda vocab_size: Qwen3MoeConfig(**SHAPE | MOE, vocab_size=vocab_size, norm_topk_prob=True),
}


def save_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> None:
    """Writes a checkpoint of random weights, stored in ``dtype``."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros would hide that they are used
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(folder)


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers computes it in ``dtype``, with the plainest of its attentions and experts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.eval()


@torch.inference_mode()
def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """After every token of one sequence, computed whole and alone: ``[T, vocabulary]``."""
    logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits
