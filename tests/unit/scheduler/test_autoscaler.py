"""Pools that grow and shrink with the load, in virtual time."""

from __future__ import annotations

import itertools
import math

import pytest

from scheduler.autoscaler import COOLDOWN_S, HOLD_DOWN_S, HOLD_UP_S, PoolLimits, PoolScaler, PoolView

EVERY_S = 2.0
TARGET_S = 1.0


class Pool:
    """A pool whose workers can do 10 units of work each; latency explodes when more arrives than can be done."""

    def __init__(self, num_workers: int, low: int = 1, high: int = 8) -> None:
        self.scaler = PoolScaler(PoolLimits(low, high))
        self.num_workers = num_workers
        self.now = 0.0
        self.changes: list[tuple[float, int]] = []

    def run(self, seconds: float, work: float) -> int:
        until = self.now + seconds
        while self.now < until:
            busyness = work / (10 * self.num_workers)
            latency_s = 0.2 / max(1 - busyness, 1e-3)
            wanted = self.scaler.decide(PoolView(self.num_workers, latency_s, TARGET_S, busyness), self.now)
            if wanted != self.num_workers:
                self.changes.append((self.now, wanted))
                self.num_workers = wanted
            self.now += EVERY_S
        return self.num_workers


def test_a_pool_that_misses_its_target_grows_to_what_the_work_needs() -> None:
    pool = Pool(1)
    assert pool.run(120, work=35) == math.ceil(35 / 10 / 0.7)
    assert len(pool.changes) == 1
    assert pool.changes[0][0] >= HOLD_UP_S


WANTED = {
    "others wait for it": PoolView(2, 0.1, TARGET_S, busyness=0.1, wait_s=3.0, wait_target_s=2.0),
    "others are refused for want of it": PoolView(2, 0.1, TARGET_S, busyness=0.1, refused=0.5),
}


@pytest.mark.parametrize("case", WANTED)
def test_a_pool_that_others_want_grows_and_does_not_shrink_however_good_its_latency_is(case: str) -> None:
    view = WANTED[case]
    scaler = PoolScaler(PoolLimits(1, 8))
    assert scaler.decide(view, 0.0) == 2
    assert scaler.decide(view, HOLD_UP_S) == 3
    most = PoolScaler(PoolLimits(1, 2))
    assert {most.decide(view, EVERY_S * step) for step in range(200)} == {2}


def test_a_pool_does_not_grow_again_before_those_it_grew_by_have_come() -> None:
    scaler = PoolScaler(PoolLimits(1, 8))
    asked = [
        scaler.decide(PoolView(2, 9.0, TARGET_S, 1.5, num_coming), EVERY_S * step)
        for num_coming in (1, 0)
        for step in range(100 * (1 - num_coming), 100 * (2 - num_coming))
    ]
    assert set(asked[:100]) == {2} and asked[100] > 2


def test_a_short_burst_grows_nothing() -> None:
    pool = Pool(1)
    for _ in range(20):
        pool.run(HOLD_UP_S - EVERY_S, work=20)
        pool.run(HOLD_UP_S, work=2)
    assert pool.changes == []


def test_a_pool_with_little_to_do_shrinks_one_by_one_to_its_minimum() -> None:
    pool = Pool(4, low=2)
    assert pool.run(HOLD_DOWN_S - EVERY_S, work=1) == 4
    assert pool.run(2000, work=1) == 2
    assert [number for _, number in pool.changes] == [3, 2]


def test_a_pool_that_is_just_busy_enough_is_left_alone() -> None:
    assert Pool(4).run(3000, work=20) == 4


def test_nothing_grows_beyond_its_limit() -> None:
    pool = Pool(2, high=3)
    assert pool.run(1000, work=500) == 3
    assert len(pool.changes) == 1


def test_a_change_waits_for_the_last_one_to_show() -> None:
    pool = Pool(1, high=8)
    pool.run(20, work=12)
    pool.run(600, work=70)
    times = [at_s for at_s, _ in pool.changes]
    assert len(times) >= 2
    assert all(later - earlier >= COOLDOWN_S for earlier, later in itertools.pairwise(times))


@pytest.mark.parametrize(("start", "end"), [(1, 2), (9, 4)])
def test_a_pool_outside_its_limits_is_brought_back(start: int, end: int) -> None:
    assert Pool(start, low=2, high=4).run(EVERY_S, work=10) == end


def test_a_load_that_swings_does_not_swing_the_pool() -> None:
    """Ten minutes up and two down, again and again: it grows once and stays."""
    pool = Pool(2)
    for _ in range(10):
        pool.run(600, work=30)
        pool.run(120, work=2)
    assert len(pool.changes) == 1


@pytest.mark.parametrize(("low", "high"), [(0, 3), (3, 2)])
def test_contradictory_limits_are_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"{low} to {high}"):
        PoolLimits(low, high)
