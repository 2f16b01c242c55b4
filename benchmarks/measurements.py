"""One request's outcome, and the pure function from many outcomes to the keys of a result file.

Definitions (times from the moment the request is sent):

========  =====================================================================================
TTFT      until the first content event
ITL       gaps between consecutive content events, of all completed requests in one pool
TPOT      (last content event - first) / (output tokens - 1); requests of one token have none
E2EL      until the event that carries ``finish_reason``
goodput   completed requests that keep every given limit, per second of the whole run. A limit is
          kept when the value is <= it; an answer of one token keeps any TPOT limit, a failed
          request keeps none. This is ``request_goodput`` of ``vllm bench serve``.
========  =====================================================================================

Latencies and throughputs count completed requests only. A number that does not exist, such as a TTFT when
nothing completed, is None (JSON null) and never 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

SummaryValue = float | int | None | dict[str, int]


class Failure(StrEnum):
    """Why a request counts as failed. An HTTP status other than 200 is ``http_<status>`` instead."""

    CONNECTION = "connection"
    TIMEOUT = "timeout"
    BAD_FRAME = "bad_frame"
    ERROR_FRAME = "error_frame"
    ABORTED = "aborted"
    NO_FINISH_REASON = "no_finish_reason"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """What happened to one request. Times in seconds since the start of the run.

    ``failure`` is None for a completed request, else the reason (a ``Failure`` or ``http_<status>``), with
    ``detail`` for people. A completed request has at least one content time, in ascending order.
    """

    scheduled_s: float
    sent_s: float
    content_times_s: tuple[float, ...]
    finished_s: float
    input_tokens: int
    output_tokens: int
    requested_output_tokens: int
    failure: str | None = None
    detail: str = ""

    @property
    def ttft_s(self) -> float:
        return self.content_times_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        if self.output_tokens < 2:
            return None
        return (self.content_times_s[-1] - self.content_times_s[0]) / (self.output_tokens - 1)

    @property
    def e2el_s(self) -> float:
        return self.finished_s - self.sent_s


@dataclass(frozen=True, slots=True)
class GoodputLimits:
    """Upper limits in milliseconds; None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft_ms, self.tpot_ms, self.e2el_ms))

    def kept_by(self, outcome: RequestOutcome) -> bool:
        """Whether a request counts for goodput."""
        if outcome.failure is not None:
            return False
        tpot_s = outcome.tpot_s
        values_s = (outcome.ttft_s, 0.0 if tpot_s is None else tpot_s, outcome.e2el_s)
        limits_ms = (self.ttft_ms, self.tpot_ms, self.e2el_ms)
        return all(limit is None or value * 1000.0 <= limit for value, limit in zip(values_s, limits_ms, strict=True))


def summarize(outcomes: Sequence[RequestOutcome], duration_s: float, limits: GoodputLimits) -> dict[str, SummaryValue]:
    """The measured keys of a result. ``duration_s`` > 0 is the whole run, first arrival to last answer."""
    completed = [outcome for outcome in outcomes if outcome.failure is None]
    input_tokens = sum(outcome.input_tokens for outcome in completed)
    output_tokens = sum(outcome.output_tokens for outcome in completed)
    summary: dict[str, SummaryValue] = {
        "completed": len(completed),
        "failed": len(outcomes) - len(completed),
        "errors": dict(Counter(str(outcome.failure) for outcome in outcomes if outcome.failure is not None)),
        "duration": duration_s,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "short_answers": sum(outcome.output_tokens < outcome.requested_output_tokens for outcome in completed),
        "request_throughput": len(completed) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / duration_s,
    }
    summary |= _goodput(outcomes, duration_s, limits)
    summary |= _percentiles("ttft", (outcome.ttft_s for outcome in completed))
    summary |= _percentiles("tpot", (t for outcome in completed if (t := outcome.tpot_s) is not None))
    summary |= _percentiles("itl", _inter_token_latencies(completed))
    summary |= _percentiles("e2el", (outcome.e2el_s for outcome in completed))
    summary |= _percentiles("send_delay", (outcome.sent_s - outcome.scheduled_s for outcome in outcomes))
    return summary


def _goodput(outcomes: Sequence[RequestOutcome], duration_s: float, limits: GoodputLimits) -> dict[str, SummaryValue]:
    """``goodput`` under its short name and under vLLM's, and as a share of all requests; None without limits."""
    if not limits:
        return {"goodput": None, "request_goodput": None, "goodput_share": None}
    good = sum(limits.kept_by(outcome) for outcome in outcomes)
    per_second = good / duration_s
    share = good / len(outcomes) if outcomes else None
    return {"goodput": per_second, "request_goodput": per_second, "goodput_share": share}


def _inter_token_latencies(completed: Iterable[RequestOutcome]) -> list[float]:
    return [gap for outcome in completed for gap in np.diff(outcome.content_times_s).tolist()]


def _percentiles(name: str, values_s: Iterable[float]) -> dict[str, SummaryValue]:
    values_ms = np.fromiter(values_s, dtype=np.float64) * 1000.0
    if values_ms.size == 0:
        return {f"mean_{name}_ms": None, f"median_{name}_ms": None, f"p99_{name}_ms": None}
    return {
        f"mean_{name}_ms": float(np.mean(values_ms)),
        f"median_{name}_ms": float(np.median(values_ms)),
        f"p99_{name}_ms": float(np.percentile(values_ms, 99)),
    }
