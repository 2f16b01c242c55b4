"""The budget of what goes back after turns."""

from __future__ import annotations

from workers.offers import BURST_S, ByteBudget


def test_a_budget_can_be_saved_up_to_its_burst() -> None:
    budget = ByteBudget(100, now=0.0)
    burst = int(100 * BURST_S)
    assert budget.take(burst, now=0.0)
    assert not budget.take(1, now=0.0)
    assert budget.take(burst, now=1000.0)
    assert not budget.take(1, now=1000.0)


def test_a_budget_comes_back_with_time_and_a_refusal_takes_nothing() -> None:
    budget = ByteBudget(100, now=0.0)
    assert budget.take(int(100 * BURST_S), now=0.0)
    assert not budget.take(51, now=0.5)
    assert budget.take(50, now=0.5)
