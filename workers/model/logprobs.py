"""Log-probabilities of given tokens under the model's own distribution, and the likeliest beside them.

The log-softmax is that of the unprocessed logits, whatever the request's parameters do to them afterwards: vLLM's
``logprobs_mode="raw_logprobs"``. A row's numbers do not depend on the rows around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scheduler.request import TokenLogprobs
from workers.model.rows import largest, padded

ROWS_AT_ONCE = 16  # a row is as long as the vocabulary, and a few copies are made of it


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """One per row of ``logits``, ``[rows, vocabulary]``, each with its row's count of likeliest tokens."""
    told: list[TokenLogprobs] = []
    for first in range(0, len(token_ids), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        told += _of_rows(padded(logits[rows]), token_ids[rows], counts[rows], logits.shape[1])
    return told


def _of_rows(
    rows: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int], vocab_size: int
) -> list[TokenLogprobs]:
    logprobs = torch.log_softmax(rows, dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=rows.device).unsqueeze(1))
    ranks = 1 + (logprobs > own).float().sum(dim=-1).long()
    told = []
    for row, (logprob, rank, count) in enumerate(zip(own[:, 0].tolist(), ranks.tolist(), counts, strict=True)):
        top_ids: list[int] = []
        top: list[float] = []
        if count:
            values, places = largest(logprobs[row : row + 1], min(count, vocab_size))
            top, top_ids = values[0].tolist(), places[0].tolist()
        told.append(TokenLogprobs(logprob, rank, tuple(top_ids), tuple(top)))
    return told
