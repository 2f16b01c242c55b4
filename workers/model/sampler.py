"""Logits to tokens. The draw of a token depends on (seed, position), its own logits and its own tokens before.

The order is vLLM's (``vllm/v1/sample/sampler.py``): what changes the logits (``workers.model.logit_processors``),
temperature, min_p, top_k, top_p, draw. Greedy takes the largest logit after the first of these. Rows are computed
together where that is faster, but each by itself, so that the batch around a sequence changes no bit of it.

- ``min_p`` m (Nguyen et al., ICLR 2025): tokens stay whose probability is at least m times the largest.
- ``top_k`` (Fan et al., ACL 2018): so many of the likeliest stay.
- ``top_p`` (Holtzman et al., ICLR 2020): the smallest set of the likeliest stays that reaches it.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from kvcache.errors import RequestError, TwinpoolError
from scheduler.request import SamplingParams
from workers.model.logit_processors import process
from workers.model.rows import NONE, Descending, index_at, largest, likeliest, padded
from workers.model.sequence_state import SequenceState
from workers.native.library import DRAW, load_library

ROWS_AT_ONCE = 8  # of a draw: their copies stay in the caches
TOP_P_CANDIDATES = 64  # the set that top_p leaves is looked for among so many, then among all
NO_STATES: Mapping[int, SequenceState] = MappingProxyType({})
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


class NotFiniteError(TwinpoolError):
    """The model computed no usable logits. ``row``: the first such row."""

    def __init__(self, row: int, of: str = "") -> None:
        super().__init__(row, of)
        self.row = row
        self._of = of

    def __str__(self) -> str:
        return f"the model's logits{self._of} are not finite"


class NothingLeftError(RequestError):
    """The request's own parameters forbid every token that could come next."""


def sample(
    logits: torch.Tensor,
    sampling: Sequence[SamplingParams],
    positions: Sequence[int],
    states: Mapping[int, SequenceState] = NO_STATES,
    likeliest_tokens: Sequence[int] | None = None,
) -> list[int]:
    """Chooses one token per row.

    Args:
        logits: ``[rows, vocabulary]``, any float dtype; not changed.
        sampling: one per row.
        positions: the position in its sequence that the new token of each row will have.
        states: row → what its sequence has come to, for rows whose parameters alter their logits.
        likeliest_tokens: ``likeliest(logits)``, where that is known.

    Raises:
        NotFiniteError: a row holds NaN or infinity, or -inf alone.
        NothingLeftError: a row has no token left after its masks.
    """
    tokens = check_finite(logits, likeliest_tokens)
    altered: dict[int, torch.Tensor] = {}
    if states:
        processed = _processed(logits, states)
        altered = dict(zip(states, processed, strict=True))
        for row, token in zip(states, likeliest(processed), strict=True):
            tokens[row] = token
        if NONE in tokens:
            raise NothingLeftError("The request's own parameters forbid every token.", None)
    draws = [
        _Draw(row, altered.get(row, logits[row]), params, uniform(params.seed, position), tokens[row])
        for row, (params, position) in enumerate(zip(sampling, positions, strict=True))
        if params.temperature > 0
    ]
    if draws:
        library = load_library()
        drawn = _draw_natively(library, draws) if library is not None else _draw_with_torch(draws)
        for draw, token in zip(draws, drawn, strict=True):
            tokens[draw.row] = token
    return tokens


def check_finite(logits: torch.Tensor, likeliest_tokens: Sequence[int] | None = None) -> list[int]:
    """Returns the likeliest token of each row, which the same pass finds.

    Raises:
        NotFiniteError: a row holds NaN or infinity, or -inf alone.
    """
    tokens = list(likeliest_tokens) if likeliest_tokens is not None else likeliest(logits)
    if NONE in tokens:
        raise NotFiniteError(tokens.index(NONE))
    return tokens


def _processed(logits: torch.Tensor, states: Mapping[int, SequenceState]) -> torch.Tensor:
    """Altered copies of the rows of ``states``, in their order."""
    rows = logits[list(states)].float()
    process(rows, list(states.values()))
    return rows


@dataclass(frozen=True, slots=True)
class _Draw:
    row: int
    logits: torch.Tensor  # [vocabulary]
    params: SamplingParams
    threshold: float
    likeliest: int

    @property
    def temperature(self) -> float:
        """One that is 0 in float32 would make 0 / 0 of the largest logit's difference from itself."""
        return max(self.params.temperature, torch.finfo(torch.float32).tiny)

    @property
    def lowest(self) -> float:
        """What min_p leaves of the differences from the largest, over the temperature."""
        return math.log(self.params.min_p) if self.params.min_p > 0 else -math.inf


def _draw_natively(library: ctypes.CDLL, draws: Sequence[_Draw]) -> list[int]:
    """The same as ``_draw_with_torch`` but for rounding, a row at a time."""
    logits = [draw.logits.float().contiguous() for draw in draws]
    size = len(logits[0])
    rows = np.empty(len(draws), dtype=DRAW)
    rows["logits"] = [row.data_ptr() for row in logits]
    rows["likeliest"] = [draw.likeliest for draw in draws]
    rows["top_k"] = [draw.params.top_k for draw in draws]
    rows["top_p"] = [draw.params.top_p for draw in draws]
    rows["threshold"] = [draw.threshold for draw in draws]
    rows["temperature"] = [draw.temperature for draw in draws]
    rows["lowest"] = [draw.lowest for draw in draws]
    num_threads = min(torch.get_num_threads(), len(draws))
    memory = torch.empty(num_threads * library.twinpool_draw_bytes(size), dtype=torch.uint8)
    library.twinpool_draw(rows.ctypes.data, len(rows), size, memory.data_ptr(), num_threads)
    tokens: list[int] = rows["token"].tolist()
    return tokens


def _draw_with_torch(draws: Sequence[_Draw]) -> list[int]:
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for index, draw in enumerate(draws):
        groups[draw.params.top_k, draw.params.top_p < 1.0].append(index)
    tokens = [NONE] * len(draws)
    for indices in groups.values():
        for first in range(0, len(indices), ROWS_AT_ONCE):
            some = indices[first : first + ROWS_AT_ONCE]
            for index, token in zip(some, _draw([draws[index] for index in some]), strict=True):
                tokens[index] = token
    return tokens


def _draw(draws: Sequence[_Draw]) -> list[int]:
    """Inverse transform sampling: over the vocabulary, or over the tokens that top_k and top_p leave.

    All have the same ``top_k``, and all or none have a ``top_p``: what is computed for one does not depend on others.
    """
    params = draws[0].params
    thresholds = torch.tensor([draw.threshold for draw in draws], dtype=torch.float64)
    rows = padded(torch.stack([draw.logits for draw in draws]))
    if params.top_k > 0:
        kept, token_ids = largest(rows, params.top_k)
        cumulative = torch.softmax(_scaled(kept, draws), dim=-1).double().cumsum(-1)
        return token_ids.gather(1, _places(cumulative, cumulative[:, -1:], draws))[:, 0].tolist()
    weights = torch.softmax(_scaled(rows, draws), dim=-1)
    if params.top_p >= 1.0:
        return index_at(weights, thresholds).tolist()
    return _draw_nuclei(weights, draws)


def _scaled(rows: torch.Tensor, draws: Sequence[_Draw]) -> torch.Tensor:
    """Differences from the largest, over the temperature, without what min_p drops. Changes ``rows``."""
    # Dividing the differences from the maximum cannot overflow, however small the temperature.
    temperatures = torch.tensor([draw.temperature for draw in draws], dtype=torch.float32)
    rows.sub_(rows.amax(dim=-1, keepdim=True)).div_(temperatures.unsqueeze(1))
    if any(draw.params.min_p > 0 for draw in draws):
        lowest = torch.tensor([draw.lowest for draw in draws], dtype=torch.float32)
        rows.masked_fill_(rows < lowest.unsqueeze(1), -torch.inf)
    return rows


def _draw_nuclei(weights: torch.Tensor, draws: Sequence[_Draw]) -> list[int]:
    """For ``padded`` rows that each add up to 1, over the vocabulary."""
    kept, token_ids = largest(weights, TOP_P_CANDIDATES)
    cumulative = kept.double().cumsum(-1)
    total = torch.ones(len(draws), 1, dtype=torch.float64)
    found = token_ids.gather(1, _places(cumulative, total, draws))[:, 0].tolist()
    reached = cumulative[:, -1].tolist()
    return [
        token if each >= draw.params.top_p else _draw_nucleus(row, draw)
        for token, each, draw, row in zip(found, reached, draws, weights, strict=True)
    ]


def _draw_nucleus(weights: torch.Tensor, draw: _Draw) -> int:
    """The same for one row, of whose largest weights many may be needed."""
    row = Descending(weights)
    last = row.reach(row.total * draw.params.top_p)
    drawn = row.exceed(last.running_sum * draw.threshold)
    return min(drawn, last, key=lambda reached: reached.place).index


def _places(cumulative: torch.Tensor, total: torch.Tensor, draws: Sequence[_Draw]) -> torch.Tensor:
    """Which of the likeliest is drawn out of the smallest prefix of them that reaches top_p of the total: ``[n, 1]``.

    A row of ``cumulative`` may end before its total where it holds that prefix.
    """
    top_p = torch.tensor([[draw.params.top_p] for draw in draws], dtype=torch.float64)
    thresholds = torch.tensor([[draw.threshold] for draw in draws], dtype=torch.float64)
    last = torch.searchsorted(cumulative[:, :-1].contiguous(), total * top_p)
    place = torch.searchsorted(cumulative, cumulative.gather(1, last) * thresholds, right=True)
    return torch.minimum(place, last)
