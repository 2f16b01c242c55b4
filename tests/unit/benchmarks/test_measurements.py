"""The summary against a slow reference, and the definition of goodput."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.measurements import GoodputLimits, RequestOutcome, summarize

VLLM_LATENCY_KEYS = {
    f"{kind}_{name}_ms" for kind in ("mean", "median", "p99") for name in ("ttft", "tpot", "itl", "e2el")
}


def outcome(
    sent_s: float, content_times_s: Sequence[float], output_tokens: int, failure: str | None = None
) -> RequestOutcome:
    return RequestOutcome(
        scheduled_s=sent_s - 0.001,
        sent_s=sent_s,
        content_times_s=tuple(content_times_s),
        finished_s=content_times_s[-1] + 0.01 if content_times_s else sent_s,
        input_tokens=100,
        output_tokens=output_tokens,
        requested_output_tokens=output_tokens,
        failure=failure,
    )


def random_outcomes(count: int) -> list[RequestOutcome]:
    rng = np.random.default_rng(5)
    outcomes = []
    for number in range(count):
        num_events = int(rng.integers(1, 30))
        sent_s = float(rng.uniform(0, 10))
        times = (sent_s + np.cumsum(rng.exponential(0.05, num_events))).tolist()
        # Some servers put several tokens into one event.
        num_tokens = num_events + (number % 3)
        outcomes.append(outcome(sent_s, times, num_tokens, "timeout" if number % 7 == 0 else None))
    return outcomes


def slow_percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between closest ranks, by hand."""
    ordered = sorted(values)
    position = percent / 100 * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def slow_latencies(outcomes: list[RequestOutcome]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": [], "e2el": []}
    for one in outcomes:
        if one.failure is not None:
            continue
        times = one.content_times_s
        values["ttft"].append(1e3 * (times[0] - one.sent_s))
        values["e2el"].append(1e3 * (one.finished_s - one.sent_s))
        values["itl"] += [1e3 * (times[i] - times[i - 1]) for i in range(1, len(times))]
        if one.output_tokens > 1:
            values["tpot"].append(1e3 * (times[-1] - times[0]) / (one.output_tokens - 1))
    return values


def test_latencies_agree_with_the_slow_reference() -> None:
    outcomes = random_outcomes(60)
    summary = summarize(outcomes, 12.0, GoodputLimits())
    for name, values in slow_latencies(outcomes).items():
        assert summary[f"mean_{name}_ms"] == pytest.approx(sum(values) / len(values))
        assert summary[f"median_{name}_ms"] == pytest.approx(slow_percentile(values, 50))
        assert summary[f"p99_{name}_ms"] == pytest.approx(slow_percentile(values, 99))


def test_throughputs_count_completed_requests_over_the_whole_duration() -> None:
    outcomes = [outcome(0.0, [1.0, 2.0], 2), outcome(0.0, [1.0], 1), outcome(0.0, [1.0, 2.0], 2, "timeout")]
    summary = summarize(outcomes, 4.0, GoodputLimits())
    assert (summary["completed"], summary["failed"]) == (2, 1)
    assert summary["request_throughput"] == 2 / 4
    assert summary["output_throughput"] == 3 / 4
    assert summary["total_token_throughput"] == 203 / 4
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (200, 3)


def test_failures_are_counted_per_reason() -> None:
    reasons = ["timeout", "http_503", "timeout", None]
    summary = summarize([outcome(0.0, [1.0], 1, reason) for reason in reasons], 1.0, GoodputLimits())
    assert summary["errors"] == {"timeout": 2, "http_503": 1}


def test_goodput_is_the_rate_of_completed_requests_that_keep_every_limit() -> None:
    outcomes = [
        outcome(0.0, [0.5, 0.6], 2),  # keeps both
        outcome(0.0, [1.0, 1.125], 2),  # exactly at both limits
        outcome(0.0, [1.5, 1.6], 2),  # TTFT too long
        outcome(0.0, [0.5, 0.9], 2),  # TPOT too long
        outcome(0.0, [0.5], 1),  # one token has no TPOT to break
        outcome(0.0, [0.5, 0.6], 2, "timeout"),
    ]
    summary = summarize(outcomes, 2.0, GoodputLimits(ttft_ms=1000, tpot_ms=125))
    assert summary["goodput"] == summary["request_goodput"] == 3 / 2
    assert summary["goodput_share"] == 3 / 6


def test_goodput_without_limits_does_not_exist() -> None:
    assert summarize([outcome(0.0, [1.0], 1)], 1.0, GoodputLimits())["goodput"] is None


def test_numbers_that_do_not_exist_are_none_and_not_zero() -> None:
    summary = summarize([outcome(0.0, [], 0, "connection")], 1.0, GoodputLimits(ttft_ms=1))
    assert summary.keys() >= VLLM_LATENCY_KEYS
    assert {summary[key] for key in VLLM_LATENCY_KEYS} == {None}
    assert summary["goodput"] == 0
    assert summarize([outcome(0.0, [1.0], 1)], 1.0, GoodputLimits())["mean_tpot_ms"] is None


def test_answers_shorter_than_asked_for_are_counted() -> None:
    short = RequestOutcome(0.0, 0.0, (1.0,), 1.0, input_tokens=1, output_tokens=3, requested_output_tokens=4)
    assert summarize([short, outcome(0.0, [1.0], 1)], 1.0, GoodputLimits())["short_answers"] == 1
