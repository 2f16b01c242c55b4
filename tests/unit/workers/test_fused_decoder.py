"""The native decoder gives what the transformers model gives, in every build that this processor can run."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
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
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from kvcache.errors import ModelError
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.batching import UNKNOWN_TOKEN, ScheduledChunk, StepPlan
from scheduler.request import SamplingParams
from workers.model.attention_layers import LayerAttention, read_attention_layers
from workers.model.fused_decoder import FusedDecoder, WeightFormat, find_misfit
from workers.model.rows import likeliest
from workers.model.runner import COMPARED_TOKENS, choose_step_model
from workers.model.step_model import StepModel
from workers.model.transformers_model import TransformersModel, load_model
from workers.native import library
from workers.native.processor import processor_flags
from workers.step_progress import StepProgress

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
BUILDS = [
    name
    for name, needed in library.BUILDS
    if needed <= processor_flags() and importlib.util.find_spec(f"workers.native.{name}") is not None
]
SEQUENCE_LENGTH = 200


@pytest.fixture(autouse=True)
def library_is_chosen_again() -> Iterator[None]:
    yield
    library.load_library.cache_clear()


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes one of the builds the only one there is."""
    monkeypatch.setattr(library, "BUILDS", tuple(entry for entry in library.BUILDS if entry[0] == request.param))
    library.load_library.cache_clear()
    return str(request.param)


def make_model(folder: Path, config: PreTrainedConfig) -> Any:
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros would hide that they are used
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
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


def assert_same_logits(model: Any, spec: KVCacheSpec, num_threads: int) -> None:
    reference, fused = TransformersModel(model), FusedDecoder(model, spec, SEQUENCE_LENGTH, num_threads)
    num_blocks = 3 * -(-SEQUENCE_LENGTH // spec.block_size)
    storages = PagedStorage(spec, num_blocks), PagedStorage(spec, num_blocks)
    for plan in steps(spec.block_size):
        expected = reference.logits(plan, storages[0])
        found = fused.logits(plan, storages[1])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    for ours, theirs in zip(storages[1].layers, storages[0].layers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_kv_equal_the_model_s(tmp_path: Path, build: str, name: str) -> None:
    config = CONFIGS[name]()
    model = make_model(tmp_path, config)
    spec = spec_of(config)
    assert find_misfit(model, spec, read_attention_layers(model, SEQUENCE_LENGTH)) is None
    assert_same_logits(model, spec, num_threads=1)


class Watched(StepProgress):
    """Compares the cache at each layer's turn with what it holds after the step."""

    def __init__(self, storage: PagedStorage) -> None:
        super().__init__(lambda _: None)
        self._storage = storage
        self.seen: list[torch.Tensor] = []

    def layer_done(self, layer: int) -> None:
        super().layer_done(layer)
        self.seen.append(self._storage.layers[layer].clone())


def test_a_transformers_model_tells_each_layer_once_its_kv_is_complete(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    model, spec = make_model(tmp_path, config), spec_of(config)
    storage = PagedStorage(spec, 3 * -(-SEQUENCE_LENGTH // spec.block_size))
    progress = Watched(storage)
    for plan in steps(spec.block_size):
        progress.seen.clear()
        TransformersModel(model).logits(plan, storage, progress)
        assert len(progress.seen) == spec.num_layers
        for early, final in zip(progress.seen, storage.layers, strict=True):
            assert torch.equal(early, final)
    progress.close()


def test_the_native_decoder_counts_its_layers_and_wakes_the_reader(tmp_path: Path, build: str) -> None:
    config = CONFIGS["llama"]()
    spec = spec_of(config)
    fused = FusedDecoder(make_model(tmp_path, config), spec, SEQUENCE_LENGTH, 1)
    read_fd, wake_fd = os.pipe()
    counter = ctypes.c_int64(0)
    progress = SimpleNamespace(counter_address=ctypes.addressof(counter), wake_fd=wake_fd)
    fused.logits(steps(spec.block_size)[0], PagedStorage(spec, 40), progress)  # type: ignore[arg-type]
    assert counter.value == spec.num_layers
    assert len(os.read(read_fd, 1000)) == spec.num_layers
    os.close(read_fd)
    os.close(wake_fd)


@pytest.mark.parametrize("block_size", [1, 8, 128])
def test_any_block_size_and_two_threads_give_the_same(tmp_path: Path, build: str, block_size: int) -> None:
    config = CONFIGS["llama"]()
    assert_same_logits(make_model(tmp_path, config), spec_of(config, block_size=block_size), num_threads=2)


LONG = 600  # several parts of a decoding sequence's keys, several blocks of a prompt's


def long_steps(block_size: int, with_neighbour: bool = True) -> list[StepPlan]:
    """A long prompt, a chunk that goes on at an odd place, then decoding; beside it another sequence."""
    width = -(-LONG // block_size)
    tables = [tuple(2 * block + which for block in reversed(range(width))) for which in range(2)]
    greedy = SamplingParams(max_tokens=1, temperature=0.0)

    def chunk(which: int, start: int, end: int) -> ScheduledChunk:
        token_ids = tuple((5 * which + 13 * position + position * position) % 131 for position in range(start, end))
        return ScheduledChunk(str(which), token_ids, start, end - start, tables[which], greedy)

    spans = [((0, 0, 301), (1, 0, 7)), ((1, 7, 8), (0, 301, 598)), ((1, 8, 263), (0, 598, 599)), ((0, 599, 600),)]
    return [StepPlan(tuple(chunk(*span) for span in step if with_neighbour or span[0] == 0)) for step in spans]


@pytest.mark.parametrize("block_size", [16, 24])
def test_long_sequences_equal_the_model_s(tmp_path: Path, build: str, block_size: int) -> None:
    config = CONFIGS["qwen3, q and k norms"]()
    model = make_model(tmp_path, config)
    spec = spec_of(config, block_size=block_size)
    reference, fused = TransformersModel(model), FusedDecoder(model, spec, LONG, 1)
    storages = [PagedStorage(spec, 2 * -(-LONG // block_size)) for _ in range(2)]
    for plan in long_steps(block_size):
        expected, found = reference.logits(plan, storages[0]), fused.logits(plan, storages[1])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("weight_format", WeightFormat)
def test_neither_threads_nor_neighbours_change_a_bit_of_a_long_sequence(
    tmp_path: Path, build: str, weight_format: WeightFormat
) -> None:
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    spec = spec_of(config)

    def logits(num_threads: int, with_neighbour: bool) -> torch.Tensor:
        fused = FusedDecoder(model, spec, LONG, num_threads, weight_format)
        storage = PagedStorage(spec, 2 * -(-LONG // spec.block_size))
        rows = []
        for plan in long_steps(spec.block_size, with_neighbour):
            found = fused.logits(plan, storage)
            rows += [row for row, chunk in zip(found, plan.chunks, strict=True) if chunk.request_id == "0"]
        return torch.stack(rows)

    expected = logits(1, with_neighbour=False)
    assert torch.equal(logits(2, with_neighbour=False), expected)
    assert torch.equal(logits(2, with_neighbour=True), expected)


@pytest.mark.parametrize("weight_format", WeightFormat)
def test_threads_change_no_bit_of_a_large_batch(tmp_path: Path, build: str, weight_format: WeightFormat) -> None:
    """Threads share its rows, where each of them does all rows of a small one."""
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    spec = spec_of(config)

    def logits(num_threads: int) -> list[torch.Tensor]:
        fused = FusedDecoder(model, spec, SEQUENCE_LENGTH, num_threads, weight_format)
        storage = PagedStorage(spec, 60)
        return [fused.logits(plan, storage) for plan in (*decoding_steps()[:2], *steps(spec.block_size))]

    expected = logits(1)
    for num_threads in (2, 3):
        assert all(torch.equal(*pair) for pair in zip(logits(num_threads), expected, strict=True))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_step_tells_where_its_time_went_when_asked(tmp_path: Path, build: str, num_threads: int) -> None:
    config = CONFIGS["llama"]()
    spec = spec_of(config)
    fused = FusedDecoder(make_model(tmp_path, config), spec, SEQUENCE_LENGTH, num_threads)
    storage = PagedStorage(spec, 60)
    plan = steps(spec.block_size)[0]
    unasked = fused.logits(plan, storage)
    fused.parts = library.Parts()
    started_ns = time.perf_counter_ns()
    assert torch.equal(fused.logits(plan, storage), unasked)
    whole_ns = time.perf_counter_ns() - started_ns
    told_ns = [getattr(fused.parts, name) for name, _ in library.Parts._fields_]
    assert all(part_ns > 0 for part_ns in told_ns)
    assert sum(told_ns) <= whole_ns


def test_what_a_sequence_computes_does_not_depend_on_its_neighbours(tmp_path: Path, build: str) -> None:
    config = CONFIGS["llama"]()
    spec = spec_of(config)
    fused = FusedDecoder(make_model(tmp_path, config), spec, SEQUENCE_LENGTH, 1)
    storage = PagedStorage(spec, 60)
    for plan in steps(spec.block_size)[:3]:
        fused.logits(plan, storage)
    together = steps(spec.block_size)[3]
    alone = [fused.logits(StepPlan((chunk,)), storage) for chunk in together.chunks]
    assert torch.equal(fused.logits(together, storage), torch.cat(alone))


def test_a_step_that_samples_nothing_leaves_the_same_kv(tmp_path: Path, build: str) -> None:
    config = CONFIGS["llama"]()
    spec = spec_of(config)
    fused = FusedDecoder(make_model(tmp_path, config), spec, SEQUENCE_LENGTH, 1)
    storages = [PagedStorage(spec, 60) for _ in range(2)]
    plan = steps(spec.block_size)[0]
    fused.logits(plan, storages[0])
    assert fused.logits_of_rows(plan, storages[1], []).shape == (0, config.vocab_size)
    for ours, theirs in zip(storages[1].layers, storages[0].layers, strict=True):
        assert torch.equal(ours, theirs)


def groups_of(values: torch.Tensor, size: int) -> torch.Tensor:
    """The last dimension in groups; what is missing from the last one is 0."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % size))
    return padded.reshape(*values.shape[:-1], -1, size)


def round_int8_weights(values: torch.Tensor) -> torch.Tensor:
    """Symmetric 8-bit rounding with a bfloat16 scale per 64 values along the last dimension: the slow reference."""
    groups = groups_of(values, 64)
    scales = round_bfloat16(groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127)
    rounded = (groups / scales).round().clamp(-127, 127) * scales
    return rounded.flatten(-2)[..., : values.shape[-1]]


def round_int8_inputs(values: torch.Tensor) -> torch.Tensor:
    """The same with float32 scales."""
    groups = groups_of(values, 64)
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((groups / scales).round() * scales).flatten(-2)[..., : values.shape[-1]]


def round_int4_weights(values: torch.Tensor) -> torch.Tensor:
    """16 steps from a group's minimum to its maximum, 32 values in a group, both ends in bfloat16."""
    size = values.shape[-1]
    rounded = torch.empty_like(values)
    for first in range(0, size, 32):
        group = values[..., first : first + 32]
        minimum = round_bfloat16(group.amin(-1, keepdim=True))
        scale = round_bfloat16((group.amax(-1, keepdim=True) - minimum) / 15).clamp_min(1e-30)
        rounded[..., first : first + 32] = ((group - minimum) / scale).round().clamp(0, 15) * scale + minimum
    return rounded


def round_bfloat16(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


def root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


# Weights so small that the layers do not blow a rounding up.
CALM: dict[str, Any] = {"num_attention_heads": 4, "hidden_size": 128, "initializer_range": 0.04}


Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Roundings:
    layers: Rounding
    head: Rounding  # and the embedding
    inputs: Rounding


ROUNDINGS = {
    WeightFormat.BFLOAT16: Roundings(round_bfloat16, round_bfloat16, round_bfloat16),
    WeightFormat.INT8: Roundings(round_int8_weights, round_int8_weights, round_int8_inputs),
    WeightFormat.INT4: Roundings(round_int4_weights, round_int8_weights, round_int8_inputs),
}


def round_linears(model: Any, roundings: Roundings) -> Any:
    """The model with embedding, weights and inputs of every linear layer rounded, all else in float32."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            is_layer = isinstance(module, torch.nn.Linear) and name != "lm_head"
            rounded = (roundings.layers if is_layer else roundings.head)(module.weight.detach())
            module.weight = torch.nn.Parameter(rounded, requires_grad=False)
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (roundings.inputs(inputs[0]),))
    return model


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


def errors_of_rounding(
    folder: Path, config: PreTrainedConfig, weight_format: WeightFormat, plans: list[StepPlan]
) -> Iterator[tuple[float, float]]:
    """Of each plan's logits: how far they are from the model with rounded linears, and that from the exact model."""
    spec = spec_of(config)  # float32 KV
    fused = FusedDecoder(make_model(folder, config), spec, SEQUENCE_LENGTH, 1, weight_format)
    reference = TransformersModel(round_linears(load_model(folder, "float32"), ROUNDINGS[weight_format]))
    exact = TransformersModel(load_model(folder, "float32"))
    storages = [PagedStorage(spec, 60) for _ in range(3)]
    for plan in plans:
        found, expected = fused.logits(plan, storages[0]), reference.logits(plan, storages[1])
        cost_of_rounding = root_mean_square(expected - exact.logits(plan, storages[2]))
        yield root_mean_square(found - expected), cost_of_rounding


@pytest.mark.parametrize("weight_format", ROUNDINGS)
@pytest.mark.parametrize("make_config", [LlamaConfig, Qwen2Config])
def test_rounded_weights_give_what_rounded_linears_give(
    tmp_path: Path, build: str, make_config: Callable[..., PreTrainedConfig], weight_format: WeightFormat
) -> None:
    config = make_config(**SHAPE | CALM | {"num_hidden_layers": 1})
    for error, cost_of_rounding in errors_of_rounding(tmp_path, config, weight_format, decoding_steps()):
        # A value at the edge of two roundings may fall to either side, for whatever comes after it. In one layer that
        # is far less than rounding costs; in two, the reference differs from itself by half as much.
        assert error < 0.1 * cost_of_rounding


@pytest.mark.parametrize("weight_format", ROUNDINGS)
def test_rounding_in_a_prompt_s_attention_costs_no_more_than_that_of_weights(
    tmp_path: Path, build: str, weight_format: WeightFormat
) -> None:
    """The build with products of bfloat16 uses them for prompts wherever weights are rounded."""
    config = LlamaConfig(**SHAPE | CALM | {"num_hidden_layers": 1})
    errors, costs_of_rounding = zip(*errors_of_rounding(tmp_path, config, weight_format, steps(16)), strict=True)
    assert sum(errors) < sum(costs_of_rounding)  # the two are near each other, so one step may go either way


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("block_size", [1, 16, 24])
def test_rounded_kv_gives_what_the_model_gives_with_it(tmp_path: Path, build: str, dtype: str, block_size: int) -> None:
    config = LlamaConfig(**SHAPE | CALM)
    model = make_model(tmp_path, config)
    spec = spec_of(config, dtype, block_size)
    exact_spec = spec_of(config, "float32", block_size)
    fused, reference = FusedDecoder(model, spec, SEQUENCE_LENGTH, 1), TransformersModel(model)
    num_blocks = 3 * -(-SEQUENCE_LENGTH // block_size)
    storages = [PagedStorage(spec, num_blocks), PagedStorage(spec, num_blocks), PagedStorage(exact_spec, num_blocks)]
    for plan in steps(block_size):
        found, expected = fused.logits(plan, storages[0]), reference.logits(plan, storages[1])
        cost_of_rounding = root_mean_square(expected - reference.logits(plan, storages[2]))
        # A value at the edge of two roundings may fall to either side.
        assert root_mean_square(found - expected) < 0.1 * cost_of_rounding
    for ours, theirs in zip(storages[0].layers, storages[1].layers, strict=True):
        numbers = slice(None, config.head_dim)  # of a row; scales are floats, equal to rounding
        assert (ours[..., numbers] == theirs[..., numbers]).float().mean() > 0.999


@pytest.mark.parametrize("weight_format", WeightFormat)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_any_weights_go_with_any_kv(tmp_path: Path, build: str, dtype: str, weight_format: WeightFormat) -> None:
    config = LlamaConfig(**SHAPE | CALM)
    model = make_model(tmp_path, config)
    found, expected = [], []
    for rows, kv in ((found, dtype), (expected, "float32")):
        spec = spec_of(config, kv)
        fused = FusedDecoder(model, spec, SEQUENCE_LENGTH, 1, weight_format)
        storage = PagedStorage(spec, 60)
        rows += [fused.logits(plan, storage) for plan in steps(spec.block_size)]
    difference = root_mean_square(torch.cat(found) - torch.cat(expected))
    assert 0 < difference < 0.05 * root_mean_square(torch.cat(expected))


def test_bfloat16_kv_is_rounded_to_nearest(tmp_path: Path, build: str) -> None:
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    storages = []
    for dtype in ("float32", "bfloat16"):
        spec = spec_of(config, dtype)
        fused = FusedDecoder(model, spec, SEQUENCE_LENGTH, 1, WeightFormat.FLOAT32)
        storages.append(PagedStorage(spec, 60))
        fused.logits(steps(spec.block_size)[0], storages[-1])
    assert torch.equal(storages[1].layers[0], storages[0].layers[0].bfloat16())
    assert not torch.equal(storages[1].layers[0].float(), storages[0].layers[0])


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", "none"), ("float32", "int8"), ("bfloat16", "int8"), ("float32", "int4")]
)
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "fp8"])
def test_rounding_is_not_taken_for_another_structure(
    tmp_path: Path, build: str, dtype: str, quantization: str, kv_dtype: str
) -> None:
    config = LlamaConfig(**SHAPE | CALM)
    make_model(tmp_path, config)
    model = load_model(tmp_path, dtype)
    assert isinstance(choose_step_model(model, spec_of(config, kv_dtype), 64, 1, quantization), FusedDecoder)


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


def test_nan_goes_on_to_the_logits_in_every_format(tmp_path: Path, build: str) -> None:
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    spec = spec_of(config)
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    for weight_format in WeightFormat:
        fused = FusedDecoder(model, spec, SEQUENCE_LENGTH, 1, weight_format)
        bad, good = ScheduledChunk("bad", (3, 7), 0, 2, (0,), greedy), ScheduledChunk("good", (3,), 0, 1, (1,), greedy)
        logits = fused.logits(StepPlan((bad, good)), PagedStorage(spec, 2))
        assert logits[0].isnan().any()
        assert logits[1].isfinite().all()


def test_the_likeliest_tokens_are_told(tmp_path: Path, build: str) -> None:
    """Of rows that end anywhere in a block, for values that are equal, and for what no token can be chosen from."""
    vocab_size = 1531
    model = make_model(tmp_path, LlamaConfig(**SHAPE | {"num_attention_heads": 4, "vocab_size": vocab_size}))
    spec = spec_of(model.config)
    head, norm = model.lm_head.weight, model.model.norm.weight
    numbers = torch.linspace(-1, 1, 1021)
    rows = {
        "usual": [float(numbers[(37 * i) % 1021]) for i in range(vocab_size)],
        "the last is largest": [0.0] * (vocab_size - 1) + [1.0],
        "the first of equals": [-1.0] * 700 + [-0.5] * (vocab_size - 700),
        "nan": [0.0] * 1000 + [math.nan] + [0.0] * (vocab_size - 1001),
        "nan at the end": [0.0] * (vocab_size - 1) + [math.nan],
        "infinity": [math.inf] + [0.0] * (vocab_size - 1),
        "all forbidden": [-math.inf] * vocab_size,
    }
    plan = steps(spec.block_size)[0]
    for name, logits in rows.items():
        with torch.no_grad():
            head.zero_()
            head[:, 0] = torch.tensor(logits)
            norm.zero_()
            norm[0] = 1.0
        fused = FusedDecoder(model, spec, SEQUENCE_LENGTH, 2)
        told = fused.run(fused.prepare(plan, PagedStorage(spec, 39)), None)
        assert told.likeliest == likeliest(told.logits), name


def test_inputs_may_get_their_tokens_later(tmp_path: Path, build: str) -> None:
    model = make_model(tmp_path, CONFIGS["llama"]())
    spec = spec_of(model.config)
    fused = FusedDecoder(model, spec, SEQUENCE_LENGTH, 1)
    storages = [PagedStorage(spec, 39) for _ in range(2)]
    for plan in steps(spec.block_size)[:3]:
        for storage in storages:
            fused.logits(plan, storage)
    plan = steps(spec.block_size)[3]
    unknown = StepPlan(tuple(replace(chunk, token_ids=(UNKNOWN_TOKEN,)) for chunk in plan.chunks))
    inputs = fused.prepare(unknown, storages[0])
    inputs.set_tokens([chunk.token_ids[0] for chunk in plan.chunks])
    assert fused.run(inputs, None).logits.equal(fused.logits(plan, storages[1]))


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


@pytest.mark.skipif(not BUILDS, reason="no native build for this processor")
@pytest.mark.parametrize("name", MISFITS)
def test_a_model_that_does_not_fit_is_named_and_left_to_transformers(tmp_path: Path, name: str) -> None:
    make_config, dtype, reason = MISFITS[name]
    config: Any = make_config()
    model = AutoModelForCausalLM.from_config(config)
    spec = spec_of(config, dtype) if name != "another structure" else KVCacheSpec(1, 2, 16, 16, dtype)
    assert reason in (find_misfit(model, spec, read_attention_layers(model, 64)) or "")


@pytest.mark.skipif(not BUILDS, reason="no native build for this processor")
@pytest.mark.parametrize(("max_model_len", "expected"), [(40, FusedDecoder), (41, TransformersModel)])
def test_a_window_wider_than_the_compared_steps_is_not_overlooked(
    tmp_path: Path, max_model_len: int, expected: type
) -> None:
    """Steps as short as those compared at load give the same with and without it."""
    config = MistralConfig(**SHAPE | {"num_attention_heads": 4}, sliding_window=40)
    assert COMPARED_TOKENS < 40
    model = make_model(tmp_path, config)
    assert isinstance(choose_step_model(model, spec_of(config), max_model_len, 1), expected)


@pytest.mark.skipif(not BUILDS, reason="no native build for this processor")
def test_soft_capped_attention_scores_are_not_overlooked(tmp_path: Path) -> None:
    """Far above the scores a cap changes less than rounding."""
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    layers = [LayerAttention(), LayerAttention(softcap=50.0)]
    assert "soft-capped" in (find_misfit(model, spec_of(config), layers) or "")


@pytest.mark.skipif(not BUILDS, reason="no native build for this processor")
@pytest.mark.parametrize(("attribute", "reason"), [("inv_freq", "turns a part"), ("other", "differs from layer")])
def test_a_rotary_embedding_of_another_kind_is_not_overlooked(tmp_path: Path, attribute: str, reason: str) -> None:
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    model.model.rotary_emb = torch.nn.Module()
    model.model.rotary_emb.register_buffer(attribute, torch.ones(4))
    assert reason in (find_misfit(model, spec_of(config), [LayerAttention()]) or "")


@pytest.mark.skipif(not BUILDS, reason="no native build for this processor")
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


@pytest.mark.skipif(not BUILDS, reason="no native build for this processor")
def test_a_model_that_was_packed_in_vain_is_loaded_again(tmp_path: Path) -> None:
    config = GraniteConfig(**SHAPE | {"num_attention_heads": 4, "hidden_size": 128}, residual_multiplier=0.5)
    model, kept = make_model(tmp_path, config), load_model(tmp_path, "float32")
    spec = spec_of(config)
    chosen = choose_step_model(model, spec, 64, 1, reload=lambda: load_model(tmp_path, "float32"))
    expected, found = logits_of_steps(TransformersModel(kept), spec), logits_of_steps(chosen, spec)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.skipif(not BUILDS, reason="no native build for this processor")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounding_does_not_hide_another_structure(tmp_path: Path, quantization: str) -> None:
    config = GraniteConfig(**SHAPE | CALM, residual_multiplier=0.5)
    model = make_model(tmp_path, config)
    with pytest.raises(ModelError, match="logits differ"):
        choose_step_model(model, spec_of(config), 64, 1, quantization)


def test_without_a_native_build_transformers_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "BUILDS", ())
    library.load_library.cache_clear()
    config = CONFIGS["llama"]()
    model = make_model(tmp_path, config)
    assert isinstance(choose_step_model(model, spec_of(config), 64, 1), TransformersModel)
