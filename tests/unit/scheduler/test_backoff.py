"""Crashes in a row wait longer and longer; health forgets them."""

from __future__ import annotations

from scheduler.backoff import HEALTHY_S, MAX_DELAY_S, RestartBackoff


def test_the_pause_doubles_up_to_a_minute() -> None:
    backoff = RestartBackoff()
    assert [backoff.delay_after(1.0) for _ in range(8)] == [1, 2, 4, 8, 16, 32, MAX_DELAY_S, MAX_DELAY_S]


def test_a_minute_of_health_begins_anew() -> None:
    backoff = RestartBackoff()
    for _ in range(5):
        backoff.delay_after(0.0)
    assert [backoff.delay_after(HEALTHY_S), backoff.delay_after(0.0)] == [1, 2]


def test_a_crash_loop_does_not_spin() -> None:
    """Ten minutes of a worker that ends as soon as it is started."""
    backoff, now, num_starts = RestartBackoff(), 0.0, 0
    while now < 600:
        now += backoff.delay_after(0.0)
        num_starts += 1
    assert num_starts < 18
