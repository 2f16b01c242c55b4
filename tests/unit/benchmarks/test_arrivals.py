"""Arrival schedules against the distributions that they claim to follow."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.arrivals import arrivals_by_count, arrivals_by_duration, draw_gaps


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_variation_of_their_gamma_distribution(burstiness: float) -> None:
    count, rate = 20_000, 5.0
    gaps = draw_gaps(np.random.default_rng(1), rate, burstiness, count)
    variation = burstiness**-0.5
    standard_error = variation / rate / math.sqrt(count)
    assert abs(gaps.mean() - 1 / rate) < 4 * standard_error
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.1)


def test_poisson_counts_in_a_second_have_a_variance_equal_to_their_mean() -> None:
    seconds, rate = 4_000, 5.0
    times = arrivals_by_duration(np.random.default_rng(2), rate, 1.0, float(seconds))
    counts = np.bincount(times.astype(int), minlength=seconds)
    assert abs(counts.mean() - rate) < 4 * math.sqrt(rate / seconds)
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=4 * math.sqrt(2 / seconds))


def test_a_fixed_count_ends_at_count_over_rate() -> None:
    times = arrivals_by_count(np.random.default_rng(3), 4.0, 0.5, 200)
    assert len(times) == 200
    assert times[-1] == pytest.approx(50.0)
    assert (np.diff(times) >= 0).all()


def test_a_duration_keeps_every_arrival_before_it_and_none_after() -> None:
    rng = np.random.default_rng(4)
    times = arrivals_by_duration(rng, 10.0, 0.1, 30.0)
    assert times.max() < 30.0
    # Very bursty: the first batch of gaps falls short for some seeds, so the tail must be filled too.
    many = [arrivals_by_duration(np.random.default_rng(seed), 10.0, 0.1, 30.0) for seed in range(50)]
    assert np.mean([len(one) for one in many]) == pytest.approx(300, rel=0.2)


def test_the_same_seed_gives_the_same_schedule() -> None:
    first, second, other = (arrivals_by_count(np.random.default_rng(seed), 4.0, 1.0, 20) for seed in (7, 7, 8))
    assert (first == second).all()
    assert not (first == other).all()


def test_infinite_rate_sends_all_at_once_and_infinite_burstiness_ticks_evenly() -> None:
    rng = np.random.default_rng(0)
    assert arrivals_by_count(rng, math.inf, 1.0, 3).tolist() == [0.0, 0.0, 0.0]
    assert arrivals_by_count(rng, 2.0, math.inf, 3).tolist() == [0.5, 1.0, 1.5]


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_rates_that_are_not_positive_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        draw_gaps(np.random.default_rng(0), rate, burstiness, 1)
