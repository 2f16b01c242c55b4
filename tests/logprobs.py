"""Log-probabilities that a sequence came with, compared with those of the reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from scheduler.request import SamplingParams, TokenLogprobs
from tests.cluster import Completion, TinyCheckpoint

TOLERANCE = 1e-3  # of logits up to some tens, computed in another order


def check_logprobs(rows: torch.Tensor, token_ids: Sequence[int], told: Sequence[TokenLogprobs], count: int) -> None:
    """``rows``: the reference's logits before each of the tokens."""
    expected = torch.log_softmax(rows.double(), dim=-1)
    assert len(told) == len(token_ids) == len(rows)
    for row, token_id, each in zip(expected, token_ids, told, strict=True):
        assert each.logprob == pytest.approx(float(row[token_id]), abs=TOLERANCE)
        assert abs(each.rank - 1 - int((row > row[token_id]).sum())) <= 1  # neighbours may change places by rounding
        assert list(each.top_logprobs) == pytest.approx(row.topk(count).values.tolist(), abs=TOLERANCE)
        assert [float(row[top]) for top in each.top_token_ids] == pytest.approx(list(each.top_logprobs), abs=TOLERANCE)


def check_all_logprobs(
    checkpoint: TinyCheckpoint, prompt: tuple[int, ...], done: Completion, sampling: SamplingParams
) -> None:
    """Everything that was told of a sequence, against ``transformers``."""
    rows = checkpoint.logits([*prompt, *done.token_ids])
    if sampling.logprobs is not None:
        check_logprobs(rows[len(prompt) - 1 : -1], done.token_ids, done.logprobs, sampling.logprobs)
    assert sampling.prompt_logprobs is not None
    check_logprobs(rows[: len(prompt) - 1], prompt[1:], done.prompt_logprobs, sampling.prompt_logprobs)
