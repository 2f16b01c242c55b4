"""Tiny models for the native decoder, and steps for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config

from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.request import SamplingParams
from scheduler.step_plan import ScheduledChunk, StepPlan
from tests.families import save_model
from workers.model.step_model import StepModel
from workers.model.transformers_model import load_model

SEQUENCE_LENGTH = 200
# Sizes that are multiples of nothing, so that every edge of the kernels is met.
SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 80,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE | {"num_attention_heads": 4, "hidden_size": 128}),
    "llama, tied, llama3 rope": lambda: LlamaConfig(
        **SHAPE | {"num_attention_heads": 5, "num_key_value_heads": 5},
        tie_word_embeddings=True,
        rope_parameters=LLAMA3_ROPE,
    ),
    "qwen2, biases": lambda: Qwen2Config(**SHAPE | {"num_attention_heads": 4, "hidden_size": 128}),
    "qwen3, q and k norms": lambda: Qwen3Config(**SHAPE),
    "phi3, merged projections": lambda: Phi3Config(
        **SHAPE | {"num_attention_heads": 4, "hidden_size": 128, "pad_token_id": 0}
    ),
    "mistral, a window as wide as the context": lambda: MistralConfig(
        **SHAPE | {"num_attention_heads": 4}, sliding_window=SEQUENCE_LENGTH
    ),
}
# Weights so small that the layers do not blow a rounding up.
CALM: dict[str, Any] = {"num_attention_heads": 4, "hidden_size": 128, "initializer_range": 0.04}


def make_model(folder: Path, config: PreTrainedConfig) -> Any:
    save_model(folder, config)
    return load_model(folder, "float32")


def spec_of(config: Any, dtype: str = "float32", block_size: int = 16) -> KVCacheSpec:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KVCacheSpec(config.num_hidden_layers, config.num_key_value_heads, head_size, block_size, dtype)


def steps(block_size: int) -> list[StepPlan]:
    """Prefill, chunks off the block edges, decoding, and all of them mixed; blocks scattered and out of order."""
    width = -(-SEQUENCE_LENGTH // block_size)
    tables = [tuple(3 * block + which for block in reversed(range(width))) for which in range(3)]
    greedy = SamplingParams(max_tokens=1, temperature=0.0)

    def chunk(which: int, start: int, end: int, sampled: bool = True) -> ScheduledChunk:
        token_ids = tuple((7 * which + 13 * position + position * position) % 131 for position in range(start, end))
        return ScheduledChunk(str(which), token_ids, start, end - start, tables[which], greedy if sampled else None)

    return [
        StepPlan((chunk(0, 0, 150),)),
        StepPlan((chunk(1, 0, 1), chunk(0, 150, 151), chunk(2, 0, 37, sampled=False))),
        StepPlan((chunk(0, 151, 152), chunk(2, 37, 40), chunk(1, 1, 62))),
        StepPlan((chunk(0, 152, 153), chunk(1, 62, 63), chunk(2, 40, 41))),
        StepPlan((chunk(2, 41, 199), chunk(0, 153, 166))),
    ]


def logits_of_steps(step_model: StepModel, spec: KVCacheSpec) -> list[torch.Tensor]:
    storage = PagedStorage(spec, 3 * -(-SEQUENCE_LENGTH // spec.block_size))
    return [step_model.logits(plan, storage) for plan in steps(spec.block_size)]


def decoding_steps() -> list[StepPlan]:
    """Many sequences, a token each at a time."""
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    return [
        StepPlan(
            tuple(
                ScheduledChunk(str(which), ((7 * which + 13 * at) % 131,), at, 1, (which,), greedy)
                for which in range(29)
            )
        )
        for at in range(6)
    ]
