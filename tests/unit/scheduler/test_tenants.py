"""Limits of one tenant over time, beside a reference that remembers every moment."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.errors import RateLimitError, RequestError
from scheduler.tenants import Tenant, TenantGate, TokenBucket
from tests.builders import repeatable


def refusal_of(gate: TenantGate, num_tokens: int, now: float) -> RateLimitError:
    with pytest.raises(RateLimitError) as refusal:
        gate.enter(num_tokens, now)
    return refusal.value


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(1, 60)), max_size=40))
@repeatable(200)
def test_no_minute_gives_more_than_a_full_bucket_and_what_flows_in(steps: Sequence[tuple[float, int]]) -> None:
    """The reference: in every interval at most one bucket beyond the rate; and who waits as told gets it."""
    bucket, now, taken = TokenBucket(60), 0.0, [(0.0, 0)]
    for pause_s, amount in steps:
        now += pause_s
        missing_s = bucket.missing_s(amount, now)
        if missing_s > 0:
            now += missing_s + 1e-6
            assert bucket.missing_s(amount, now) == 0
        bucket.take(amount)
        taken.append((now, amount))
    for start in range(len(taken)):
        total = 0
        for at_s, amount in taken[start:]:
            total += amount
            assert total <= 60 + (at_s - taken[start][0]) * 1.0 + 1e-3


def test_requests_per_minute_are_refused_until_the_time_that_was_told() -> None:
    gate = TenantGate(Tenant("a", requests_per_minute=2))
    gate.enter(10, 0.0)
    gate.enter(10, 0.0)
    refusal = refusal_of(gate, 10, 0.0)
    assert (refusal.limit, refusal.retry_after_s) == ("requests_per_minute", 30.0)
    assert "'a'" in refusal.message
    assert refusal_of(gate, 10, 29.9).retry_after_s == pytest.approx(0.1)
    gate.enter(10, 30.0)
    assert gate.num_running == 3


def test_tokens_that_were_not_used_are_given_back() -> None:
    gate = TenantGate(Tenant("a", tokens_per_minute=600))
    gate.enter(500, 0.0)
    refusal = refusal_of(gate, 200, 0.0)
    assert (refusal.limit, refusal.retry_after_s) == ("tokens_per_minute", 10.0)
    gate.leave(num_unused_tokens=100)
    gate.enter(200, 0.0)
    assert refusal_of(gate, 1, 0.0).limit == "tokens_per_minute"


def test_running_requests_are_counted_until_they_leave() -> None:
    gate = TenantGate(Tenant("a", running_requests=1))
    gate.enter(10, 0.0)
    assert refusal_of(gate, 10, 100.0).limit == "running_requests"
    gate.leave(0)
    gate.enter(10, 100.0)
    assert gate.num_running == 1


def test_a_refused_request_charges_nothing() -> None:
    gate = TenantGate(Tenant("a", requests_per_minute=2, tokens_per_minute=100))
    gate.enter(100, 0.0)
    for _ in range(5):
        assert refusal_of(gate, 50, 0.0).limit == "tokens_per_minute"
    gate.enter(50, 30.0)
    assert gate.num_running == 2


def test_what_can_never_fit_is_the_clients_fault() -> None:
    gate = TenantGate(Tenant("a", tokens_per_minute=100))
    with pytest.raises(RequestError, match="101 tokens"):
        gate.enter(101, 0.0)


def test_without_limits_everything_enters() -> None:
    gate = TenantGate(Tenant("a"))
    for _ in range(1000):
        gate.enter(10**9, 0.0)
    assert gate.num_running == 1000
