"""What is sent when: the plan of a run, drawn completely before it starts.

Every concern draws from its own stream of the seed, so that other lengths leave the arrivals alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from benchmarks.arrivals import arrivals_by_count, arrivals_by_duration
from benchmarks.traces import MOONCAKE_BLOCK_TOKENS, TraceRow
from kvcache.errors import ConfigError

TokenIds = NDArray[np.int64]

_WORD_LIST = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue "
    "side kind head house service friend father power hour game line end member law car city community "
    "name president team minute idea kid body information back parent face level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher force education"
)
WORDS = tuple(_WORD_LIST.split())


class RandomStream(IntEnum):
    """Independent streams under one seed; the numbers are part of what a seed means."""

    ARRIVALS = 0
    INPUT_LENGTHS = 1
    OUTPUT_LENGTHS = 2
    PROMPTS = 3
    PREFIX_BLOCKS = 4
    WARM_UP = 5


def stream_rng(seed: int, stream: RandomStream, index: int = 0) -> np.random.Generator:
    """The generator of one stream (and of one item in it). ``seed`` and ``index`` must not be negative."""
    return np.random.default_rng([seed, int(stream), index])


@dataclass(frozen=True, slots=True)
class LengthRange:
    """A length in tokens, uniform on [low, high], both ends included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> LengthRange:
        """``"256"`` or ``"uniform:64:512"``. Raises ValueError for anything else."""
        if text.startswith("uniform:"):
            low, _, high = text.removeprefix("uniform:").partition(":")
            lengths = cls(int(low), int(high))
        else:
            lengths = cls(int(text), int(text))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError("a length needs 1 <= low <= high")
        return lengths

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        return [int(length) for length in rng.integers(self.low, self.high, size=count, endpoint=True)]


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to come. ``index`` numbers the requests of a run and seeds the prompt."""

    index: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    prefix_block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SyntheticLoad:
    """Random arrivals and lengths. At least one of ``num_prompts`` and ``duration_s`` is given; both limit."""

    request_rate: float
    burstiness: float
    num_prompts: int | None
    duration_s: float | None
    input_lengths: LengthRange
    output_lengths: LengthRange


def plan_synthetic(load: SyntheticLoad, seed: int) -> list[PlannedRequest]:
    """The requests of a synthetic load in the order of arrival."""
    rng = stream_rng(seed, RandomStream.ARRIVALS)
    if load.duration_s is not None:
        times = arrivals_by_duration(rng, load.request_rate, load.burstiness, load.duration_s)[: load.num_prompts]
    elif load.num_prompts is not None:
        times = arrivals_by_count(rng, load.request_rate, load.burstiness, load.num_prompts)
    else:
        raise ConfigError("a synthetic load needs a number of prompts or a duration")
    inputs = load.input_lengths.draw(stream_rng(seed, RandomStream.INPUT_LENGTHS), len(times))
    outputs = load.output_lengths.draw(stream_rng(seed, RandomStream.OUTPUT_LENGTHS), len(times))
    lengths = zip(times.tolist(), inputs, outputs, strict=True)
    return [PlannedRequest(index, *arrival_and_lengths) for index, arrival_and_lengths in enumerate(lengths)]


def plan_trace(
    rows: Sequence[TraceRow], scale: float, num_prompts: int | None, duration_s: float | None
) -> list[PlannedRequest]:
    """The leading rows of a trace, replayed ``scale`` times as fast; ``duration_s`` is time after scaling."""
    end_s = math.inf if duration_s is None else duration_s
    planned = [
        PlannedRequest(index, row.arrival_s / scale, row.input_tokens, row.output_tokens, row.prefix_block_ids)
        for index, row in enumerate(rows[:num_prompts])
    ]
    return [request for request in planned if request.arrival_s < end_s]


def shorten_inputs(plan: Sequence[PlannedRequest], max_input_tokens: int) -> list[PlannedRequest]:
    """The plan with prompts cut to ``max_input_tokens``; a shared prefix stays shared."""
    return [replace(request, input_tokens=min(request.input_tokens, max_input_tokens)) for request in plan]


def offered_rate(plan: Sequence[PlannedRequest]) -> float:
    """Requests per second until the last arrival; infinite when all arrive at once."""
    last_s = plan[-1].arrival_s
    return len(plan) / last_s if last_s > 0 else math.inf


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Random prompts from the token ids [low_id, high_id): the same seed and request give the same prompt.

    Requests with equal leading ``prefix_block_ids`` get equal leading tokens, ``MOONCAKE_BLOCK_TOKENS`` per
    id, so that a replayed trace hits a prefix cache as the recorded traffic did.
    """

    seed: int
    low_id: int
    high_id: int

    def token_ids(self, request: PlannedRequest) -> TokenIds:
        """``request.input_tokens`` ids."""
        num_blocks = math.ceil(request.input_tokens / MOONCAKE_BLOCK_TOKENS)
        parts = [
            self._draw(RandomStream.PREFIX_BLOCKS, block_id, MOONCAKE_BLOCK_TOKENS)
            for block_id in request.prefix_block_ids[:num_blocks]
        ]
        num_missing = request.input_tokens - MOONCAKE_BLOCK_TOKENS * len(parts)
        if num_missing > 0:
            parts.append(self._draw(RandomStream.PROMPTS, request.index, num_missing))
        return np.concatenate(parts)[: request.input_tokens]

    def words(self, request: PlannedRequest) -> str:
        """As many common words as ``request`` has input tokens; most vocabularies have each as one token."""
        return " ".join(WORDS[token_id % len(WORDS)] for token_id in self.token_ids(request).tolist())

    def for_warm_up(self) -> PromptMaker:
        """A maker whose prompts share nothing with this one's, so that no cache is warm for the run."""
        return replace(self, seed=int(stream_rng(self.seed, RandomStream.WARM_UP).integers(2**32, 2**33)))

    def _draw(self, stream: RandomStream, index: int, count: int) -> TokenIds:
        return stream_rng(self.seed, stream, index).integers(self.low_id, self.high_id, size=count)
