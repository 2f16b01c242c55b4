"""When requests arrive: a seeded random generator in, arrival times in seconds out.

Pure: no clock, no sleeping. The whole schedule is drawn before the first request is sent, so a slow
server cannot change it (open loop).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

ArrivalTimes = NDArray[np.float64]


def draw_gaps(rng: np.random.Generator, request_rate: float, burstiness: float, count: int) -> ArrivalTimes:
    """``count`` gaps between arrivals, in seconds, with mean ``1 / request_rate``.

    The gaps are gamma distributed with shape ``burstiness``, as in ``vllm bench serve``: 1 is a Poisson
    process, below 1 is burstier (coefficient of variation ``burstiness ** -0.5``), infinity is a metronome.
    Both numbers must be positive; ``request_rate`` infinite means that everything arrives at once.
    """
    if not request_rate > 0 or not burstiness > 0:
        raise ValueError("request_rate and burstiness must be positive")
    if math.isinf(request_rate):
        return np.zeros(count)
    if math.isinf(burstiness):
        return np.full(count, 1.0 / request_rate)
    return rng.gamma(shape=burstiness, scale=1.0 / (request_rate * burstiness), size=count)


def arrivals_by_count(rng: np.random.Generator, request_rate: float, burstiness: float, count: int) -> ArrivalTimes:
    """Exactly ``count`` arrivals, the last one at ``count / request_rate`` seconds.

    The random sum is rescaled to that time, as ``vllm bench serve`` does, so that two seeds offer the same
    load and differ in its shape only.
    """
    times: ArrivalTimes = np.cumsum(draw_gaps(rng, request_rate, burstiness, count))
    if count > 0 and math.isfinite(request_rate):
        times *= count / request_rate / times[-1]
    return times


def arrivals_by_duration(
    rng: np.random.Generator, request_rate: float, burstiness: float, duration_s: float
) -> ArrivalTimes:
    """All arrivals of the process before ``duration_s``; their number is random. The rate must be finite."""
    if math.isinf(request_rate):
        raise ValueError("a duration needs a finite request_rate")
    batch = max(16, math.ceil(request_rate * duration_s))
    gaps = draw_gaps(rng, request_rate, burstiness, batch)
    while gaps.sum() < duration_s:
        gaps = np.concatenate([gaps, draw_gaps(rng, request_rate, burstiness, batch)])
    times = np.cumsum(gaps)
    return times[times < duration_s]
