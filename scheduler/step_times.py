"""How much one step holds, as the cost model counts it: of a step that ran, and of one that is simulated."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.step_plan import ScheduledChunk
from scheduler.types import StepTimes


def step_times(chunks: Iterable[ScheduledChunk], seconds: float) -> StepTimes:
    """One step. Tokens that are computed again after a preemption count as a prompt's: they cost as much."""
    prompt_tokens = prompt_pairs = decode_tokens = context_tokens = 0
    for chunk in chunks:
        num_tokens = len(chunk.token_ids)
        if num_tokens == 1 and not chunk.num_prompt_tokens:
            decode_tokens += 1
            context_tokens += chunk.end
        else:
            prompt_tokens += num_tokens
            prompt_pairs += num_tokens * chunk.start + num_tokens * (num_tokens + 1) // 2
    return StepTimes(1, prompt_tokens, prompt_pairs, decode_tokens, context_tokens, seconds)
