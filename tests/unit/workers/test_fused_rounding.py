"""What the native decoder rounds, it rounds as the slow reference does: weights, activations and KV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from kvcache.storage import PagedStorage
from scheduler.step_plan import StepPlan
from tests.unit.workers.native_models import (
    CALM,
    CONFIGS,
    SEQUENCE_LENGTH,
    SHAPE,
    decoding_steps,
    make_model,
    spec_of,
    steps,
)
from workers.model.fused_decoder import FusedDecoder, WeightFormat
from workers.model.runner import choose_step_model
from workers.model.transformers_model import TransformersModel, load_model

# Weights so wide that three layers make of any rounding the most that is seen.
WIDE: dict[str, Any] = {
    "num_attention_heads": 4,
    "hidden_size": 64,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "initializer_range": 0.3,
}


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
@pytest.mark.parametrize("weights", [CALM, WIDE], ids=["calm", "wide"])
def test_rounding_is_not_taken_for_another_structure(
    tmp_path: Path, build: str, weights: dict[str, Any], dtype: str, quantization: str, kv_dtype: str
) -> None:
    config = LlamaConfig(**SHAPE | weights)
    make_model(tmp_path, config)
    model = load_model(tmp_path, dtype)
    assert isinstance(choose_step_model(model, spec_of(config, kv_dtype), 64, 1, quantization), FusedDecoder)
