"""Every family that is served: logits of the paged path are those of transformers' own attention on whole sequences."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.request import SamplingParams
from scheduler.step_plan import ScheduledChunk, StepPlan
from tests.families import (
    FAMILIES,
    NO_SPECIAL_TOKENS,
    gemma2,
    gemma3,
    load_reference,
    mistral,
    phi3,
    reference_logits,
    save_model,
)
from workers.model.attention_layers import own_logits
from workers.model.comparison import compared_logits, find_difference
from workers.model.runner import choose_step_model
from workers.model.transformers_model import TransformersModel, load_model

VOCAB_SIZE = 97
LENGTH = 70
BLOCK_SIZE = 4  # 16 in tests/integration/test_families.py
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
# Of the largest logit. float32 rounds to 1e-7; sums in another order, over four layers of wide weights, come to some
# 1e-6. A token more or less in a window, or an angle of a neighbour, changes 1e-2 and more (tested below).
TOLERANCE = 2e-5


def sequences() -> list[list[int]]:
    return [random.Random(seed).choices(range(VOCAB_SIZE), k=LENGTH) for seed in range(3)]


def spec_of(model: Any, dtype: str = "float32") -> KVCacheSpec:
    config = model.config
    num_heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    return KVCacheSpec(config.num_hidden_layers, num_kv_heads, head_size, BLOCK_SIZE, dtype)


# (sequence, start, end) of the chunks of each step
PREFILL_AND_DECODE = [[(0, 0, 41)], *([(0, at, at + 1)] for at in range(41, 46))]
CHUNKED_AND_MIXED = [
    [(0, 0, 7), (1, 0, 1)],
    [(1, 1, 2), (0, 7, 31), (2, 0, 3)],
    [(2, 3, 4), (0, 31, 32), (1, 2, 44)],
    [(0, 32, 33), (1, 44, 45), (2, 4, 5)],
    [(2, 5, 70), (0, 33, 34), (1, 45, 64)],
]


def plan_of(step: list[tuple[int, int, int]]) -> StepPlan:
    """Blocks scattered and out of order."""
    width = -(-LENGTH // BLOCK_SIZE)
    tables = [tuple(3 * block + which for block in reversed(range(width))) for which in range(3)]
    return StepPlan(
        tuple(
            ScheduledChunk(str(which), tuple(sequences()[which][start:end]), start, end - start, tables[which], GREEDY)
            for which, start, end in step
        )
    )


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Whole prompt then decoding; then prompts in chunks, decoding and prompts mixed."""
    save_model(tmp_path, FAMILIES[name](VOCAB_SIZE))
    reference = load_reference(tmp_path)
    expected = [reference_logits(reference, token_ids) for token_ids in sequences()]
    model = load_model(tmp_path, "float32")
    paged = TransformersModel(model)
    for steps in (PREFILL_AND_DECODE, CHUNKED_AND_MIXED):
        storage = PagedStorage(spec_of(model), 3 * -(-LENGTH // BLOCK_SIZE))
        for step in steps:
            found = paged.logits(plan_of(step), storage)
            assert_close(found, torch.stack([expected[which][end - 1] for which, _, end in step]))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3"])
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(tmp_path: Path, name: str) -> None:
    """Within twice the largest difference: sums are added up in another order."""
    save_model(tmp_path, FAMILIES[name](VOCAB_SIZE))
    exact, rounded = (load_reference(tmp_path, dtype) for dtype in (torch.float32, torch.bfloat16))
    model = load_model(tmp_path, "bfloat16")
    paged = TransformersModel(model)
    for steps in (PREFILL_AND_DECODE, CHUNKED_AND_MIXED):
        storage = PagedStorage(spec_of(model, "bfloat16"), 3 * -(-LENGTH // BLOCK_SIZE))
        found, expected, theirs = [], [], []
        for step in steps:
            found.append(paged.logits(plan_of(step), storage).float())
            for logits, reference in ((expected, exact), (theirs, rounded)):
                logits += [reference_logits(reference, sequences()[which])[end - 1].float() for which, _, end in step]
        off, usual = (
            float((logits - torch.stack(expected)).abs().max()) for logits in (torch.cat(found), torch.stack(theirs))
        )
        assert 0 < off <= 2 * usual


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (mistral(22), mistral(23)),
        (mistral(3), mistral(None)),
        (gemma2(), gemma2(attn_logit_softcapping=None)),
        (gemma2(), gemma2(final_logit_softcapping=None)),
        (gemma2(), gemma2(query_pre_attn_scalar=16)),
        (gemma2(), gemma2(layer_types=["full_attention"] * 4)),
        (gemma3(), gemma3(rope_parameters=gemma3()(1).rope_parameters["full_attention"])),
        (FAMILIES["phi3, longrope"], phi3()),
    ],
)
def test_what_makes_a_family_special_is_far_above_the_tolerance(tmp_path: Path, config: Any, changed: Any) -> None:
    """The comparison above could not fail otherwise."""
    logits = []
    for which in (config, changed):
        save_model(tmp_path, which(VOCAB_SIZE))
        logits.append(reference_logits(load_reference(tmp_path), sequences()[0])[-1])
    assert float((logits[0] - logits[1]).abs().max()) > 100 * TOLERANCE * float(logits[0].abs().max())


@pytest.mark.parametrize("num_positions", [4, 9, 23])
def test_a_model_with_fewer_positions_than_are_compared_is_compared_on_those(
    tmp_path: Path, num_positions: int
) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=num_positions, **NO_SPECIAL_TOKENS)
    save_model(tmp_path, config)
    model, other = load_model(tmp_path, "float32"), load_model(tmp_path, "float32")
    spec = KVCacheSpec(1, 2, 16, 4, "float32")
    assert isinstance(choose_step_model(model, spec, num_positions, 1), TransformersModel)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
        assert find_difference(model, TransformersModel(model), compared_logits(other), spec) is not None


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2"])
def test_a_model_made_in_memory_runs_with_paged_attention_and_without_dropout(name: str) -> None:
    """Loading does both by itself; a model from its configuration has another attention, and is in training."""
    config: Any = FAMILIES[name](VOCAB_SIZE)
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config)
    paged = TransformersModel(model)
    storage = PagedStorage(spec_of(model), 3 * -(-LENGTH // BLOCK_SIZE))
    found = [paged.logits(plan_of(step), storage)[0] for step in PREFILL_AND_DECODE]
    expected = own_logits(model, sequences()[0][:46])
    assert_close(torch.stack(found), expected[40:])
