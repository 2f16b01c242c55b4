"""Masks, biases and penalties: what changes logits before temperature, for many rows at once.

In the order of vLLM (``vllm/v1/sample/sampler.py``, ``apply_logits_processors``):

1. ``allowed_token_ids``: every other logit becomes -inf.
2. ``bad_words``: the last token of each, where the output ends with what stands before it, becomes -inf.
3. ``min_tokens``: stop tokens become -inf.
4. ``logit_bias`` is added.
5. ``repetition_penalty`` r (Keskar et al.: CTRL, 2019): of tokens in prompt or output, a logit above zero is divided
   by r, another is multiplied by it.
6. ``frequency_penalty`` times the number of the token's places in the output is subtracted, then
   ``presence_penalty`` where that number is not zero (OpenAI's API reference, "Frequency and presence penalties").

Only the tokens that a step names are touched; no row is walked along but for ``allowed_token_ids``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from workers.model.sequence_state import SequenceState


def process(logits: torch.Tensor, states: Sequence[SequenceState]) -> None:
    """Changes ``logits``, float32 ``[rows, vocabulary]`` and contiguous, in place; one state per row."""
    _keep_allowed(logits, states)
    flat = logits.view(-1)
    size = logits.shape[1]
    forbidden = [row * size + token_id for row, state in enumerate(states) for token_id in state.forbidden()]
    if forbidden:
        flat[torch.tensor(forbidden)] = -torch.inf
    biases = [
        (row * size + token_id, bias)
        for row, state in enumerate(states)
        for token_id, bias in state.sampling.logit_bias
    ]
    if biases:
        places, values = zip(*biases, strict=True)
        flat.index_put_((torch.tensor(places),), torch.tensor(values), accumulate=True)
    penalized = [row for row, state in enumerate(states) if state.sampling.has_penalties]
    if penalized:
        _penalize(flat, size, penalized, [states[row] for row in penalized])


def _keep_allowed(logits: torch.Tensor, states: Sequence[SequenceState]) -> None:
    for row, state in enumerate(states):
        if state.allowed is not None:
            kept = logits[row, state.allowed]
            logits[row] = -torch.inf
            logits[row, state.allowed] = kept


def _penalize(flat: torch.Tensor, size: int, rows: Sequence[int], states: Sequence[SequenceState]) -> None:
    """All rows' used tokens as one list, each with its row's penalties."""
    lengths = [len(state.counts.token_ids) for state in states]
    places = np.concatenate([state.counts.token_ids for state in states]) + np.repeat(np.array(rows) * size, lengths)
    counts = np.concatenate([state.counts.output_counts for state in states])
    repetition, frequency, presence = (
        np.repeat(np.array(values, dtype=np.float32), lengths)
        for values in zip(
            *(
                (state.sampling.repetition_penalty, state.sampling.frequency_penalty, state.sampling.presence_penalty)
                for state in states
            ),
            strict=True,
        )
    )
    where = torch.from_numpy(places)
    found = flat[where].numpy()
    found = np.where(found > 0, found / repetition, found * repetition)
    found -= frequency * counts
    found -= presence * (counts > 0)
    flat[where] = torch.from_numpy(found)
