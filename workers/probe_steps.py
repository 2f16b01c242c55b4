"""The native decoder's own rates: steps of a small made-up model, computed as the worker's model is.

Products of torch would not do: the decoder's packed linear layers are several times as fast where a step has few rows,
which is what decoding is, and torch has none of its quantized formats.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvcache.spec import KVCacheSpec
from kvcache.storage import TORCH_DTYPES, PagedStorage
from scheduler.step_plan import ScheduledChunk, StepPlan
from scheduler.types import GemmRate
from workers.model.fused_decoder import FusedDecoder
from workers.model.runner import QUANTIZED
from workers.model.shape import WEIGHT_BYTES

_HIDDEN_SIZE = 1024  # about; a multiple of 64 and of the heads
_INTERMEDIATE_SIZE = 2816
_VOCAB_SIZE = 64  # a head that costs nothing
_KV_BYTES = 32 << 20
_CONTEXT = 2048  # tokens of each sequence whose attention is timed


@dataclass(frozen=True, slots=True)
class StepRates:
    gemm_rates: tuple[GemmRate, ...]
    attention_gb_s: float


def measure_steps(
    spec: KVCacheSpec,
    num_heads: int,
    dtype: str,
    quantization: str,
    num_threads: int,
    rows: Sequence[int],
    repeats: int,
    weight_bytes: int,
) -> StepRates:
    """Times steps of a model with the KV cache and heads of ``spec``, best of ``repeats``,
    and about ``weight_bytes`` of weights.

    A step of few rows is one of so many decoding sequences without context, a step of many one prompt's chunk.
    """
    weight_format = dtype if quantization == "none" else quantization
    steps = _ProbeSteps(spec, num_heads, dtype, weight_format, num_threads, max(rows), weight_bytes)
    seconds = {count: steps.best_seconds(steps.prompt(count), repeats) for count in rows}
    rates = tuple(GemmRate(count, count * steps.row_flops / seconds[count] / 1e9) for count in rows)
    with_context_s = steps.best_seconds(steps.decode(_CONTEXT), repeats)
    without_s = steps.best_seconds(steps.decode(1), repeats)
    read_bytes = steps.num_sequences * _CONTEXT * steps.spec.token_bytes
    return StepRates(rates, read_bytes / max(with_context_s - without_s, 1e-6) / 1e9)


class _ProbeSteps:
    def __init__(
        self,
        spec: KVCacheSpec,
        num_heads: int,
        dtype: str,
        weight_format: str,
        num_threads: int,
        most_rows: int,
        weight_bytes: int,
    ) -> None:
        hidden_size = 64 * num_heads * max(1, round(_HIDDEN_SIZE / (64 * num_heads)))
        kv_size, query_size = spec.num_kv_heads * spec.head_size, num_heads * spec.head_size
        layer_weights = hidden_size * (2 * query_size + 2 * kv_size + 3 * _INTERMEDIATE_SIZE)
        num_layers = max(1, round(weight_bytes / (layer_weights * WEIGHT_BYTES[weight_format])))
        self.row_flops = 2.0 * layer_weights * num_layers
        self.spec = KVCacheSpec(num_layers, spec.num_kv_heads, spec.head_size, spec.block_size, spec.dtype)
        self._blocks_each = spec.num_blocks_for(max(_CONTEXT, most_rows))
        self.num_sequences = max(1, round(_KV_BYTES / (_CONTEXT * self.spec.token_bytes)))
        self._storage = PagedStorage(self.spec, self._blocks_each * self.num_sequences)
        model = _made_up_model(self.spec, num_heads, hidden_size, dtype)
        longest = self._blocks_each * spec.block_size
        self._decoder = FusedDecoder(
            model, self.spec, longest, num_threads, QUANTIZED.get(weight_format), drops_packed=True
        )

    def prompt(self, num_tokens: int) -> StepPlan:
        return StepPlan((self._chunk(0, 0, num_tokens),))

    def decode(self, context: int) -> StepPlan:
        return StepPlan(tuple(self._chunk(number, context - 1, 1) for number in range(self.num_sequences)))

    def best_seconds(self, plan: StepPlan, repeats: int) -> float:
        rows = list(range(sum(len(chunk.token_ids) for chunk in plan.chunks)))  # others end before the last layer
        self._decoder.logits_of_rows(plan, self._storage, rows[:1])  # takes the memory that comes with the first use
        seconds = []
        for _ in range(repeats):
            started_s = time.perf_counter()
            self._decoder.logits_of_rows(plan, self._storage, rows)
            seconds.append(time.perf_counter() - started_s)
        return min(seconds)

    def _chunk(self, sequence: int, start: int, num_tokens: int) -> ScheduledChunk:
        blocks = range(sequence * self._blocks_each, (sequence + 1) * self._blocks_each)
        return ScheduledChunk(str(sequence), (1,) * num_tokens, start, 0, tuple(blocks), None)


def _made_up_model(spec: KVCacheSpec, num_heads: int, hidden_size: int, dtype: str) -> Any:
    """Its weights are all the same: what they are makes no step faster, and drawing them takes longer than packing."""
    # Only where steps are timed, and by then transformers has loaded the model that is served.
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=_INTERMEDIATE_SIZE,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.to(dtype=TORCH_DTYPES[dtype])
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its angles are no parameters, and were not computed
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    return model
