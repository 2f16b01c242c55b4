"""Logits to tokens. The draw of a token depends on (seed, position) and its own logits, on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scheduler.request import SamplingParams

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) fixed by (seed, position).

    SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), used as a
    counter-based generator: no state to move when a sequence moves to another worker.
    """
    mixed = _splitmix64((_splitmix64(seed & _MASK) + position) & _MASK)
    return (mixed >> 11) / (1 << 53)


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(logits: torch.Tensor, sampling: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Chooses one token per row.

    Args:
        logits: ``[rows, vocabulary]``, any float dtype.
        sampling: one per row.
        positions: the position in its sequence that the new token of each row will have.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, (params, position) in enumerate(zip(sampling, positions, strict=True)):
        if params.temperature > 0:
            tokens[row] = _draw(logits[row].float(), params, uniform(params.seed, position))
    return tokens


def _draw(logits: torch.Tensor, params: SamplingParams, threshold: float) -> int:
    """Inverse transform sampling over the tokens that top_k and top_p leave, likeliest first."""
    # Dividing the differences from the maximum cannot overflow, however small the temperature; but one that
    # is 0 in float32 would make 0 / 0 of the maximum itself.
    scaled = (logits - logits.max()) / max(params.temperature, torch.finfo(torch.float32).tiny)
    if params.top_k <= 0 and params.top_p >= 1.0:
        cumulative = torch.softmax(scaled, dim=-1).double().cumsum(-1)
        return _index_of(cumulative, threshold)
    count = min(params.top_k, len(logits)) if params.top_k > 0 else len(logits)
    kept, token_ids = scaled.topk(count)  # sorted, so that top_p keeps a prefix
    cumulative = torch.softmax(kept, dim=-1).double().cumsum(-1)
    # The smallest prefix that reaches top_p (Holtzman et al., ICLR 2020).
    num_kept = 1 + int(torch.searchsorted(cumulative, float(cumulative[-1]) * params.top_p))
    return int(token_ids[_index_of(cumulative[:num_kept], threshold)])


def _index_of(cumulative: torch.Tensor, fraction: float) -> int:
    """The first index whose cumulative weight exceeds ``fraction`` of the total."""
    index = int(torch.searchsorted(cumulative, float(cumulative[-1]) * fraction, right=True))
    return min(index, len(cumulative) - 1)
