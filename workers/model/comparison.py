"""Whether a way to run a model gives the model's own results: logits after the tokens of a few short steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch

from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.request import SamplingParams
from scheduler.step_plan import ScheduledChunk, StepPlan
from workers.model.attention_layers import own_logits
from workers.model.shape import count_experts
from workers.model.step_model import StepModel
from workers.parallel.rank import Rank

# Of two implementations' logits, by what weights and KV are rounded to: how far apart they are, of their size. Wide
# random weights, which are the worst to round, give some 1e-6 in float32, 3e-2 in bfloat16, 2e-1 in int8 and fp8, 7e-1
# in int4; logits that have nothing to do with each other are 1.4 apart. Mild differences, which that would hide, are
# found in ``narrow_model``, where nothing is rounded.
MAX_RELATIVE_DIFFERENCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 3e-1, "fp8": 3e-1, "int4": 9e-1}
COMPARED_TOKENS = 24  # or as many as the model has positions for
OTHER_PROMPTS = (1, 3, 5)  # tokens of those that decode beside the long one


class RowKind(Enum):
    """What computes a token's row: each kind takes another way through attention."""

    PROMPT = "a prompt's first chunk"
    CONTINUED = "a chunk that goes on"
    DECODE = "a token by itself"


def compared_logits(model: Any) -> torch.Tensor:
    """What ``model`` gives by itself after each of the tokens that ``find_difference`` compares."""
    positions = getattr(model.config, "max_position_embeddings", None) or COMPARED_TOKENS
    return own_logits(model, compared_tokens(int(model.config.vocab_size), min(COMPARED_TOKENS, positions)))


def compared_tokens(vocab_size: int, count: int = COMPARED_TOKENS) -> tuple[int, ...]:
    """The tokens that a model is given before it serves."""
    return tuple((37 * i + 11) % vocab_size for i in range(count))


def find_difference(
    model: Any,
    step_model: StepModel,
    expected: torch.Tensor,
    spec: KVCacheSpec,
    rank: Rank | None = None,
    weights: str | None = None,
) -> float | None:
    """How far a way to run ``model`` is from its ``compared_logits``, if that is more than rounding explains.

    ``weights`` is what they are rounded to, by default the model's own dtype. All ranks hear the same.
    """
    differences = relative_differences(expected, step_model, spec, int(model.config.vocab_size))
    has_experts = count_experts(model.config) is not None
    difference = max(_typical(rows, has_experts) for rows in differences.values())
    if rank is not None:
        difference = rank.largest(difference)
    dtypes = (weights or str(model.dtype).removeprefix("torch."), spec.dtype)
    # Two roundings know nothing of each other, so their squares add up.
    allowed = math.hypot(*(MAX_RELATIVE_DIFFERENCE[dtype] for dtype in dtypes))
    return difference if difference > allowed else None


def differs_by(difference: float) -> str:
    """In the words of what is told about a model."""
    return f"its logits differ by {difference:.2g} of their size"


def _typical(rows: Sequence[float], has_experts: bool) -> float:
    """Of one kind, so that a few rows of a kind that is wrong are not outvoted by the others.

    Rounding may send a token to another expert, and that token only, so among experts a row by itself says nothing.
    """
    return statistics.median(rows) if has_experts else math.sqrt(statistics.fmean(row * row for row in rows))


def relative_differences(
    expected: torch.Tensor, step_model: StepModel, spec: KVCacheSpec, vocab_size: int
) -> dict[RowKind, list[float]]:
    """Runs a few steps: how far the logits of each row are from ``expected``, of the usual size of a row.

    ``expected`` is of ``compared_logits``, of a rank its part of them. It is where the model computes.
    """
    plans = comparison_plans(spec.block_size, compared_tokens(vocab_size, len(expected)))
    num_blocks = 1 + max(block for plan in plans for chunk in plan.chunks for block in chunk.block_table)
    storage = PagedStorage(spec, num_blocks, str(expected.device))
    # Of a rank all may be zero, where its part of the vocabulary is not used.
    size = max(float(expected.float().norm()) / math.sqrt(len(expected)), torch.finfo(torch.float32).tiny)
    differences: dict[RowKind, list[float]] = {}
    for plan in plans:
        positions = [at for chunk in plan.chunks for at in range(chunk.start, chunk.end)]
        kinds = [kind_of(chunk) for chunk in plan.chunks for _ in chunk.token_ids]
        found = step_model.logits(plan, storage).float()
        distances = (found - expected[positions].float()).norm(dim=-1) / size
        for kind, distance in zip(kinds, distances.tolist(), strict=True):
            differences.setdefault(kind, []).append(distance if math.isfinite(distance) else math.inf)
    return differences


def kind_of(chunk: ScheduledChunk) -> RowKind:
    """Of all rows of a chunk."""
    if chunk.start == 0:
        return RowKind.PROMPT
    return RowKind.CONTINUED if len(chunk.token_ids) > 1 else RowKind.DECODE


def comparison_plans(block_size: int, token_ids: Sequence[int]) -> tuple[StepPlan, ...]:
    """A prompt in two chunks, the second beside others that decode, then all decoding; all with the same tokens.

    Logits are asked for after every token.
    """
    count = len(token_ids)
    first, second = count * 13 // COMPARED_TOKENS, count * 21 // COMPARED_TOKENS
    # Where each of them is after each step.
    ends = [(first, second, second + 1), *((length, length + 1, length + 2) for length in OTHER_PROMPTS)]
    width = -(-count // block_size)

    def chunk(sequence: int, start: int, end: int) -> ScheduledChunk:
        table = tuple(range(sequence * width, (sequence + 1) * width))
        greedy = SamplingParams(max_tokens=1, temperature=0.0)
        tokens = tuple(token_ids[start:end])
        return ScheduledChunk(str(sequence), tokens, start, len(tokens), table, greedy, prompt_targets=tokens[1:])

    plans = []
    for step in range(3):
        spans = [(which, end[step - 1] if step else 0, end[step]) for which, end in enumerate(ends)]
        chunks = [chunk(which, start, end) for which, start, end in spans if start < end <= count]
        plans.append(StepPlan(tuple(sorted(chunks, key=lambda chunk: len(chunk.token_ids)))))  # who decodes comes first
    return tuple(plan for plan in plans if plan.chunks)
