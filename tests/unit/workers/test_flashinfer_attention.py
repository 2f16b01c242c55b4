"""What we plan for FlashInfer: with the same arrays a slow stand-in computes what portable attention computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from kvcache.spec import KVCacheSpec
from scheduler.step_plan import ScheduledChunk, StepPlan
from tests.builders import BLOCK_SIZE, make_scheduled
from tests.fake_flashinfer import FakeFlashInfer
from tests.families import gemma2
from tests.tiny_model import VOCAB_SIZE, tiny_llama, tiny_spec
from workers.model.attention import choose
from workers.model.attention.flashinfer_backend import FlashInferAttention
from workers.model.attention.interface import AttentionBackend
from workers.model.attention.page_tables import build_step_tables
from workers.model.attention.torch_backend import TorchAttention
from workers.model.attention_layers import LayerAttention
from workers.model.comparison import compared_logits, relative_differences
from workers.model.step_inputs import packed_chunks
from workers.model.transformers_model import ATTENTION_NAME, TransformersModel

SPEC = KVCacheSpec(num_layers=1, num_kv_heads=2, head_size=8, block_size=BLOCK_SIZE, dtype="float32")
NUM_HEADS = 6
NUM_BLOCKS = 40
PLAIN = LayerAttention()
SCALE = 0.3

# (tokens in the cache, tokens in the chunk) of each sequence
STEPS = {
    "one decoding": [(6, 1)],
    "decoding at every place of a block": [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (15, 1)],
    "prompts of a block's length": [(0, 4), (0, 8), (0, 3), (0, 5)],
    "chunks that start inside a block and at its edge": [(3, 6), (8, 6), (5, 2)],
    "decode and prompts, mixed": [(0, 7), (9, 1), (6, 5), (21, 1), (0, 2), (0, 1), (13, 14)],
}


def make_step(spans: list[tuple[int, int]]) -> StepPlan:
    """Blocks are scattered, and each sequence has one more than it needs."""
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    chunks: list[ScheduledChunk] = []
    for sequence, (start, length) in enumerate(spans):
        count = -(-(start + length) // BLOCK_SIZE) + 1
        table, order = order[:count], order[count:]
        chunks.append(make_scheduled(str(sequence), range(length), start, table))
    return StepPlan(tuple(chunks))


def make_tensors(step: StepPlan) -> tuple[torch.Tensor, ...]:
    """A cache full of noise, then queries, keys and values as a transformers model lays them out."""
    generator = torch.Generator().manual_seed(2)
    num_tokens = sum(len(chunk.token_ids) for chunk in step.chunks)
    shape = (NUM_BLOCKS, 2, SPEC.num_kv_heads, SPEC.block_size, SPEC.head_size)
    heads = (NUM_HEADS, SPEC.num_kv_heads, SPEC.num_kv_heads)
    rows = (torch.randn(count, num_tokens, SPEC.head_size, generator=generator).transpose(0, 1) for count in heads)
    return torch.randn(shape, generator=generator), *rows


def make_backend() -> FlashInferAttention:
    return FlashInferAttention(FakeFlashInfer(), "cpu")


@pytest.mark.parametrize("name", STEPS)
def test_attention_and_cache_equal_those_of_portable_attention(name: str) -> None:
    step = make_step(STEPS[name])
    cache, *rows = make_tensors(step)
    expected_cache = cache.clone()
    expected = TorchAttention().plan(step, SPEC).attend(expected_cache, *rows, PLAIN, SCALE)
    found = make_backend().plan(step, SPEC).attend(cache, *rows, PLAIN, SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache, expected_cache)


def test_a_backend_is_used_for_many_steps() -> None:
    backend = make_backend()
    for spans in STEPS.values():
        step = make_step(spans)
        cache, *rows = make_tensors(step)
        expected = TorchAttention().plan(step, SPEC).attend(cache.clone(), *rows, PLAIN, SCALE)
        found = backend.plan(step, SPEC).attend(cache, *rows, PLAIN, SCALE)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_step_is_planned_once_for_all_layers_of_a_kind() -> None:
    backend, step = make_backend(), make_step([(0, 7), (9, 1)])
    cache, *rows = make_tensors(step)
    planned = backend.plan(step, SPEC)
    for layer in (PLAIN, LayerAttention(window=4), PLAIN, LayerAttention(window=4)):
        planned.attend(cache, *rows, layer, SCALE)
    assert [plan.options["window_left"] for plan in backend.library.plans] == [-1, -1, 3, 3]
    assert [plan.causal for plan in backend.library.plans] == [False, True, False, True]


def reference(step: StepPlan, cache: torch.Tensor, query: torch.Tensor, layer: LayerAttention) -> torch.Tensor:
    """One token at a time, from the definitions in ``LayerAttention``."""
    decode, prompts = packed_chunks(step)
    places = [(chunk, position) for chunk in decode + prompts for position in range(chunk.start, chunk.end)]
    output = torch.zeros_like(query)
    for row, (chunk, position) in enumerate(places):
        seen = range(0 if layer.window is None else max(0, position + 1 - layer.window), position + 1)
        for head in range(NUM_HEADS):
            kv_head = head // (NUM_HEADS // SPEC.num_kv_heads)
            products, values = [], []
            for other in seen:
                block, place = chunk.block_table[other // BLOCK_SIZE], other % BLOCK_SIZE
                product = SCALE * float(cache[block, 0, kv_head, place] @ query[row, head])
                capped = product if layer.softcap is None else layer.softcap * math.tanh(product / layer.softcap)
                products.append(capped)
                values.append(cache[block, 1, kv_head, place])
            output[row, head] = torch.softmax(torch.tensor(products), dim=0) @ torch.stack(values)
    return output


@pytest.mark.parametrize(
    "layer",
    [LayerAttention(window=1), LayerAttention(window=6), LayerAttention(window=5, softcap=0.7)],
    ids=str,
)
@pytest.mark.parametrize("make", [make_backend, TorchAttention], ids=["flashinfer", "torch"])
def test_windows_count_the_token_itself_and_caps_bound_the_products(
    make: Callable[[], AttentionBackend], layer: LayerAttention
) -> None:
    step = make_step([(0, 7), (9, 1), (6, 5), (0, 1)])
    cache, query, key, value = make_tensors(step)
    found = make().plan(step, SPEC, {layer.window}).attend(cache, query, key, value, layer, SCALE)
    torch.testing.assert_close(found, reference(step, cache, query, layer), rtol=1e-5, atol=1e-5)


def test_page_tables_list_used_blocks_only_and_part_where_the_prompts_begin() -> None:
    decode = make_scheduled("d", [5], 7, [3, 9, 4])
    prompt = make_scheduled("p", [1, 2, 3], 6, [8, 2, 7])
    tables = build_step_tables(StepPlan((prompt, decode)), BLOCK_SIZE)
    assert (tables.pages.indices.tolist(), tables.pages.indptr.tolist()) == ([3, 9, 8, 2, 7], [0, 2, 5])
    assert tables.pages.last_page_len.tolist() == [4, 1]
    assert (tables.row_sequences.tolist(), tables.row_positions.tolist()) == ([0, 1, 1, 1], [7, 6, 7, 8])
    assert tables.new_blocks.tolist() == [7]
    prompts = tables.pages.part(1, 2)
    assert (prompts.indptr.tolist(), prompts.indices.tolist()) == ([0, 3], [8, 2, 7])
    assert prompts.last_page_len.tolist() == [1]


def test_a_model_gives_its_own_logits_through_flashinfer(tmp_path: Path) -> None:
    spec = tiny_spec()
    model = tiny_llama(tmp_path, spec)
    fast = TransformersModel(model, attention=make_backend())
    assert max(map(max, relative_differences(compared_logits(model), fast, spec, VOCAB_SIZE).values())) < 1e-5


def test_windows_and_caps_of_each_layer_reach_flashinfer() -> None:
    """Windows of six tokens in every other layer, and a scale that is not the usual one."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(gemma2(sliding_window=6)(VOCAB_SIZE)).eval()
    model.set_attn_implementation(ATTENTION_NAME)
    config = model.config
    spec = KVCacheSpec(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, BLOCK_SIZE, "float32")
    backend = make_backend()
    fast = TransformersModel(model, attention=backend)
    assert max(map(max, relative_differences(compared_logits(model), fast, spec, VOCAB_SIZE).values())) < 1e-5
    plans = [plan.options for plan in backend.library.plans]
    assert {(plan["window_left"], plan["logits_soft_cap"]) for plan in plans} == {(5, 1.5), (-1, 1.5)}


@pytest.mark.parametrize(
    ("dtype", "model_dtype", "head_size", "words"),
    [
        ("float32", "float32", 64, "not float32"),
        ("int8", "bfloat16", 64, "not int8"),
        ("fp8", "bfloat16", 64, "not fp8"),
        ("bfloat16", "float32", 64, "these are float32 and bfloat16"),
        ("bfloat16", "bfloat16", 80, "this model's is 80"),
        ("float16", "float16", 128, None),
    ],
)
def test_a_cache_that_flashinfer_cannot_serve_is_named(
    dtype: str, model_dtype: str, head_size: int, words: str | None
) -> None:
    misfit = choose.find_flashinfer_misfit(tiny_spec(head_size, dtype), model_dtype)
    assert misfit is None if words is None else words in (misfit or "")
