"""A random Llama that computes in milliseconds, and steps for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kvcache.spec import KVCacheSpec
from scheduler.request import SamplingParams
from scheduler.step_plan import ScheduledChunk, StepPlan
from workers.model.transformers_model import load_model

VOCAB_SIZE = 48
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


def tiny_spec(head_size: int = 16, dtype: str = "float32") -> KVCacheSpec:
    return KVCacheSpec(num_layers=2, num_kv_heads=2, head_size=head_size, block_size=4, dtype=dtype)


def tiny_llama(folder: Path, spec: KVCacheSpec, device: str = "cpu") -> nn.Module:
    """Written to ``folder`` and loaded as a worker loads it. Three heads share a KV head."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=3 * spec.num_kv_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_model(folder, spec.dtype, device)


def tokens_of(sequence: int, start: int, end: int) -> tuple[int, ...]:
    return tuple((7 * sequence + 5 * position + 3) % VOCAB_SIZE for position in range(start, end))


def make_plan(*chunks: tuple[int, int, int], blocks: Sequence[Sequence[int]]) -> StepPlan:
    """Chunks as (sequence, start, end); ``blocks`` are the sequences' block tables."""
    return StepPlan(
        tuple(
            ScheduledChunk(
                str(sequence), tokens_of(sequence, start, end), start, end - start, tuple(blocks[sequence]), GREEDY
            )
            for sequence, start, end in chunks
        )
    )
