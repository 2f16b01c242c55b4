"""Rows of logits, block by block: the maximum, the largest few and a draw without sorting a vocabulary.

A row is as long as the vocabulary, and torch's ``argmax``, ``topk`` and ``cumsum`` walk along it element by element.
Its ``amax`` and ``sum`` do not, so they are taken over blocks first, and the slow operations see a few blocks only.
Every row is computed by itself: the rows around it change no bit of its result.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

BLOCK = 256
SMALL_BLOCK = 64  # of which the largest few are gathered
PIECE_BITS = 16  # lower bits of a float32 that a histogram leaves out
NONE = -1
_BELOW_ONE = 1.0 - 2.0**-50


@dataclass(frozen=True, slots=True)
class Reached:
    """A place in a descending row."""

    place: tuple[int, int]  # of two places the later one is larger
    running_sum: float  # up to and with it
    index: int  # in the row


def likeliest(logits: torch.Tensor) -> list[int]:
    """The first index of each row's maximum, in one pass; ``NONE`` where it is not finite.

    A row with a NaN has NaN for its maximum.
    """
    size = logits.shape[1]
    end = size // BLOCK * BLOCK
    maxima = []
    if end:
        maxima.append(logits[:, :end].unflatten(1, (-1, BLOCK)).amax(dim=-1))
    if end < size:
        maxima.append(logits[:, end:].amax(dim=-1, keepdim=True))
    of_blocks = torch.cat(maxima, dim=1) if len(maxima) > 1 else maxima[0]
    best = of_blocks.argmax(dim=-1)
    largest = of_blocks.gather(1, best.unsqueeze(1))
    # The last block may be short: read from a little before it instead, where nothing is larger.
    first = (best * BLOCK).clamp(max=max(0, size - BLOCK))
    width = min(BLOCK, size)
    inside = logits.gather(1, first.unsqueeze(1) + torch.arange(width, device=logits.device))
    # An earlier block may hold the same value where the window reaches back; then it would have been the best.
    found = first + (inside == largest).to(torch.uint8).argmax(dim=-1)
    return torch.where(torch.isfinite(largest[:, 0]), found, NONE).tolist()


def padded(rows: torch.Tensor) -> torch.Tensor:
    """A float32 copy whose rows end in -inf at a whole number of blocks."""
    num_rows, size = rows.shape
    copy = torch.empty(num_rows, -(-size // BLOCK) * BLOCK, dtype=torch.float32, device=rows.device)
    copy[:, :size] = rows
    copy[:, size:] = -torch.inf
    return copy


def largest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest of each of ``padded`` rows and where they are, largest first.

    They are all in the ``count`` blocks with the largest maxima.
    """
    size = rows.shape[1]
    count = min(count, size)
    if count * SMALL_BLOCK * 2 > size:
        values, places = rows.topk(count)
        return values, places
    blocks = rows.unflatten(1, (-1, SMALL_BLOCK))
    chosen = blocks.amax(dim=-1).topk(count).indices
    gathered = blocks.gather(1, chosen.unsqueeze(2).expand(-1, -1, SMALL_BLOCK)).flatten(1)
    values, places = gathered.topk(count)
    return values, chosen.gather(1, places // SMALL_BLOCK) * SMALL_BLOCK + places % SMALL_BLOCK


def index_at(weights: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """Inverse transform: where the running sum of each of ``padded`` rows exceeds a fraction of its total.

    Args:
        weights: not negative; no row is all zeros.
        fractions: float64 in [0, 1), one per row.

    Returns:
        int64, one per row; always the place of a weight above zero.
    """
    blocks = weights.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(dim=-1).double()
    running = sums.cumsum(dim=-1)
    target = fractions.clamp(max=_BELOW_ONE).unsqueeze(1) * running[:, -1:]
    block = torch.searchsorted(running, target, right=True)
    within = (target - (running - sums).gather(1, block)) / sums.gather(1, block)
    inside = blocks[torch.arange(len(blocks), device=weights.device), block[:, 0]].double().cumsum(dim=-1)
    # A fraction again, since a block's own running sum differs from its sum above by rounding.
    target = within.clamp(0.0, _BELOW_ONE) * inside[:, -1:]
    return block[:, 0] * BLOCK + torch.searchsorted(inside, target, right=True)[:, 0]


class Descending:
    """A row of weights, float32 and not negative, from the largest to the smallest; ties in order of their indices.

    Only the weights around the places that are asked for are sorted. The order of such floats is that of their bits: a
    histogram over the upper ones says where a running sum gets to.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self._weights = weights
        self._pieces = weights.view(torch.int32) >> PIECE_BITS
        self._running = torch.bincount(self._pieces, weights=weights.double()).flip(0).cumsum(0)
        self.total = float(self._running[-1])

    def reach(self, target: float) -> Reached:
        """The first place at which the running sum is ``target`` or more, but for rounding; 0 < target <= total."""
        return self._find(max(target, sys.float_info.min), right=False)

    def exceed(self, target: float) -> Reached:
        """The first place at which the running sum is more than ``target``; 0 <= target < total."""
        return self._find(target, right=True)

    def _find(self, target: float, *, right: bool) -> Reached:
        piece = min(int(torch.searchsorted(self._running, target, right=right)), len(self._running) - 1)
        before = float(self._running[piece - 1]) if piece else 0.0
        inside = (self._pieces == len(self._running) - 1 - piece).nonzero()[:, 0]
        values, order = self._weights[inside].sort(descending=True, stable=True)
        running = before + values[values > 0].double().cumsum(0)
        place = min(int(torch.searchsorted(running, target, right=right)), len(running) - 1)
        return Reached((piece, place), float(running[place]), int(inside[order[place]]))
