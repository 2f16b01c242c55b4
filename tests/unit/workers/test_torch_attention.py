"""Paged attention against a dense reference that goes token by token and head by head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from kvcache.rows import decode_rows, encode_rows
from scheduler.step_plan import ScheduledChunk, StepPlan
from tests.builders import BLOCK_SIZE, make_scheduled
from workers.model.attention import torch_backend
from workers.model.attention.torch_backend import paged_attention
from workers.model.step_inputs import PagedAttentionInputs, build_step_inputs

HEAD_SIZE = 8
SCALE = 0.3  # not 1 / sqrt(8), so that the given scale is seen to be used
MAX_TOKENS = 100  # per sequence; a token id is sequence * MAX_TOKENS + position

# (tokens in the cache, tokens in the chunk) of each sequence
STEPS = {
    "one decoding": [(6, 1)],
    "decoding at every place of a block": [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (15, 1)],
    "a whole prompt": [(0, 11)],
    "prompts of a block's length": [(0, 4), (0, 8), (0, 3), (0, 5)],
    "a chunk that starts inside a block": [(3, 6)],
    "a chunk that starts at a block's edge": [(8, 6)],
    "a chunk inside one block": [(5, 2)],
    "a long chunk after a short one": [(2, 30)],
    "decode and prompts, mixed": [(0, 7), (9, 1), (6, 5), (21, 1), (0, 2), (0, 1), (13, 14)],
}


@dataclass(slots=True)
class Step:
    """A step, its cache before it, and the tensors of its tokens by (sequence, position)."""

    spans: list[tuple[int, int]]
    chunks: list[ScheduledChunk]
    queries: torch.Tensor  # [sequences, MAX_TOKENS, num_heads, HEAD_SIZE]
    keys: torch.Tensor  # [sequences, MAX_TOKENS, num_kv_heads, HEAD_SIZE]
    values: torch.Tensor
    cache: torch.Tensor
    inputs: PagedAttentionInputs
    rows: list[tuple[int, int]]  # (sequence, position) of each packed row
    window: int | None = None
    softcap: float | None = None

    def run(self) -> torch.Tensor:
        query, key, value = (
            torch.stack([source[sequence, position] for sequence, position in self.rows])
            for source in (self.queries, self.keys, self.values)
        )
        return paged_attention(query, key, value, self.cache, self.inputs, SCALE, self.softcap)

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        return self.chunks[sequence].block_table[position // BLOCK_SIZE], position % BLOCK_SIZE


def make_step(
    spans: list[tuple[int, int]],
    num_heads: int = 4,
    num_kv_heads: int = 2,
    garbage: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Step:
    """Blocks are scattered, and each sequence has one block more than it needs. Whatever belongs to no token
    that may be read is ``garbage``."""
    generator = torch.Generator().manual_seed(len(spans))
    sizes = [-(-(start + length) // BLOCK_SIZE) + 1 for start, length in spans]
    order = (torch.randperm(sum(sizes), generator=generator) + 1).tolist()  # block 0 pads tables and is nobody's
    chunks = []
    for sequence, (start, length) in enumerate(spans):
        table, order = order[: sizes[sequence]], order[sizes[sequence] :]
        first_id = sequence * MAX_TOKENS + start
        chunks.append(make_scheduled(str(sequence), range(first_id, first_id + length), start, table))
    inputs = build_step_inputs(StepPlan(tuple(chunks)), BLOCK_SIZE, windows=(window,))
    step = Step(
        spans,
        chunks,
        torch.randn(len(spans), MAX_TOKENS, num_heads, HEAD_SIZE, generator=generator),
        torch.randn(len(spans), MAX_TOKENS, num_kv_heads, HEAD_SIZE, generator=generator),
        torch.randn(len(spans), MAX_TOKENS, num_kv_heads, HEAD_SIZE, generator=generator),
        torch.full((sum(sizes) + 1, 2, num_kv_heads, BLOCK_SIZE, HEAD_SIZE), garbage),
        inputs.attention[window],
        [divmod(token_id, MAX_TOKENS) for token_id in inputs.token_ids[0].tolist()],
        window,
        softcap,
    )
    for sequence, (start, _) in enumerate(spans):
        for position in range(start):
            block, offset = step.place(sequence, position)
            step.cache[block, 0, :, offset] = step.keys[sequence, position]
            step.cache[block, 1, :, offset] = step.values[sequence, position]
    return step


def reference_attention(step: Step, sequence: int, position: int) -> list[list[float]]:
    """One token: softmax over itself and all before it in its window, in double precision, a number at a time."""
    keys, values = step.keys[sequence].tolist(), step.values[sequence].tolist()
    output = []
    heads_per_kv_head = step.queries.shape[2] // step.keys.shape[2]
    for head, query in enumerate(step.queries[sequence, position].tolist()):
        kv_head = head // heads_per_kv_head
        seen = range(0 if step.window is None else max(0, position + 1 - step.window), position + 1)
        products = [SCALE * sum(q * k for q, k in zip(query, keys[other][kv_head], strict=True)) for other in seen]
        if step.softcap is not None:
            products = [step.softcap * math.tanh(product / step.softcap) for product in products]
        weights = [math.exp(product - max(products)) for product in products]
        output.append(
            [
                sum(weight * values[other][kv_head][d] for other, weight in zip(seen, weights, strict=True))
                / sum(weights)
                for d in range(HEAD_SIZE)
            ]
        )
    return output


def check_against_reference(step: Step, output: torch.Tensor) -> None:
    expected = torch.tensor([reference_attention(step, *row) for row in step.rows])
    assert sum(length for _, length in step.spans) == len(step.rows)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_every_token_attends_to_its_own_sequence_up_to_itself(name: str) -> None:
    step = make_step(STEPS[name])
    check_against_reference(step, step.run())


# Smaller than a block, its size, no multiple of it, and larger than some sequences.
@pytest.mark.parametrize("window", [1, 3, 4, 6, 13])
@pytest.mark.parametrize("name", STEPS)
def test_with_a_window_every_token_attends_to_the_last_ones_only(name: str, window: int) -> None:
    step = make_step(STEPS[name], window=window)
    check_against_reference(step, step.run())


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", STEPS)
def test_soft_capping_bounds_the_scores(name: str, window: int | None) -> None:
    step = make_step(STEPS[name], window=window, softcap=0.7)
    check_against_reference(step, step.run())


def test_soft_capping_a_few_rows_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "MAX_SCORES", 200)
    for window in (None, 6):
        step = make_step(STEPS["decode and prompts, mixed"], window=window, softcap=0.7)
        check_against_reference(step, step.run())


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_blocks_before_the_window_are_not_read(softcap: float | None) -> None:
    """Not a number in one of them would show, mask or not."""
    clean, dirty = (make_step([(21, 1), (30, 5), (13, 1)], window=6, softcap=softcap) for _ in range(2))
    for sequence, (start, _) in enumerate(dirty.spans):
        for block in range((start + 1 - 6) // BLOCK_SIZE):
            dirty.cache[dirty.chunks[sequence].block_table[block]] = math.nan
    assert dirty.cache.isnan().any()
    assert torch.equal(clean.run(), dirty.run())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STEPS)
def test_a_rounded_cache_gives_attention_over_rounded_keys_and_values(name: str, dtype: torch.dtype) -> None:
    step = make_step(STEPS[name])
    step.cache = encode_rows(step.cache, dtype)
    output = step.run()
    step.keys, step.values = (decode_rows(encode_rows(x, dtype), torch.float32) for x in (step.keys, step.values))
    check_against_reference(step, output)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (6, 2), (9, 3), (8, 1)])
def test_query_heads_share_key_heads_in_order(num_heads: int, num_kv_heads: int) -> None:
    step = make_step([(7, 1), (0, 6), (5, 3), (2, 1)], num_heads, num_kv_heads)
    check_against_reference(step, step.run())


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", STEPS)
def test_what_belongs_to_no_token_is_not_read(name: str, window: int | None) -> None:
    """Padding, blocks for later tokens, and the rest of the last block."""
    clean, dirty = make_step(STEPS[name], window=window), make_step(STEPS[name], garbage=1e9, window=window)
    assert torch.equal(clean.run(), dirty.run())


@pytest.mark.parametrize("name", STEPS)
def test_new_keys_and_values_are_stored_in_wiped_blocks_and_nothing_else_changes(name: str) -> None:
    step = make_step(STEPS[name], garbage=-7.0)
    expected = step.cache.clone()
    for sequence, position in step.rows:
        block, offset = step.place(sequence, position)
        if offset == 0:  # a block's first token: what an earlier owner left goes
            expected[block] = 0
    for sequence, position in step.rows:
        block, offset = step.place(sequence, position)
        expected[block, 0, :, offset] = step.keys[sequence, position]
        expected[block, 1, :, offset] = step.values[sequence, position]
    step.run()
    assert torch.equal(step.cache, expected)


def test_a_prompt_in_chunks_gives_what_it_gives_at_once() -> None:
    """Chunks of 3, 1, 6 and 4 tokens, one step each, against one step of 14."""
    whole = make_step([(0, 14)])
    expected = whole.run()
    cache = torch.zeros_like(whole.cache)
    outputs = []
    for start, end in [(0, 3), (3, 4), (4, 10), (10, 14)]:
        chunk = make_scheduled("0", range(start, end), start, whole.chunks[0].block_table)
        inputs = build_step_inputs(StepPlan((chunk,)), BLOCK_SIZE).attention[None]
        query, key, value = (source[0, start:end] for source in (whole.queries, whole.keys, whole.values))
        outputs.append(paged_attention(query, key, value, cache, inputs, SCALE))
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache, whole.cache)
