"""What the processors should do to one row, as plainly as it can be said."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from scheduler.request import SamplingParams


def processed(
    logits: Sequence[float], sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """A row after masks, biases and penalties. Rounds to float32 after every operation, as tensors do."""
    row = [np.float32(logit) for logit in logits]
    low = np.float32(-math.inf)
    if sampling.allowed_token_ids:
        row = [logit if token in sampling.allowed_token_ids else low for token, logit in enumerate(row)]
    for word in sampling.bad_words:
        *before, last = word
        if list(output[len(output) - len(before) :]) == before and len(before) <= len(output):
            row[last] = low
    if len(output) < sampling.min_tokens:
        for token in sampling.stop_token_ids:
            row[token] = low
    for token, bias in sampling.logit_bias:
        row[token] += np.float32(bias)
    for token in range(len(row)):
        if token in prompt or token in output:
            factor = np.float32(sampling.repetition_penalty)
            row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
        row[token] -= np.float32(sampling.frequency_penalty) * np.float32(list(output).count(token))
        row[token] -= np.float32(sampling.presence_penalty) * np.float32(token in output)
    return [float(logit) for logit in row]
