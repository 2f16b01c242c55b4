"""How many workers a pool should have: more when it misses its target, fewer when little is to be done."""

from __future__ import annotations

import math
from dataclasses import dataclass

HOLD_UP_S = 15.0  # the target is missed for so long
HOLD_DOWN_S = 300.0  # there was little to do for so long: a worker that is started again costs its load and its cache
COOLDOWN_S = 60.0  # after a change, until its effect shows
LOW_BUSYNESS = 0.4  # of the pool that would be left after one has gone
GOOD_BUSYNESS = 0.7  # what a pool that grows is sized for
MOST_REFUSED = 0.05  # of the requests, for want of workers: those that are placed may keep every target because of it


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """
    Raises:
        ValueError: there is no number between them.
    """

    min_workers: int
    max_workers: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"a pool cannot have {self.min_workers} to {self.max_workers} workers")


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool now. ``latency_s`` is what is predicted for a request placed now: TTFT of a prefill pool, TPOT of a decode
    pool; ``wait_s``, for one that comes now, until it is placed, where this pool is what it waits for; ``refused``, the
    part that is sent away for want of this pool. ``busyness`` is the work that arrives over what the workers can do."""

    num_workers: int  # those that were asked for, whether or not they run already
    latency_s: float
    target_s: float
    busyness: float
    num_coming: int = 0  # of them: they start for the first time, or wait for a node
    wait_s: float = 0.0
    wait_target_s: float = math.inf
    refused: float = 0.0

    @property
    def misses_target(self) -> bool:
        """Of those that wait before a pool or are refused its latency says nothing: it may be good because of them."""
        return self.latency_s > self.target_s or self.wait_s > self.wait_target_s or self.refused > MOST_REFUSED


@dataclass(slots=True)
class PoolScaler:
    """One pool over time, with hysteresis. It only says a number: whoever shrinks a pool drains first."""

    limits: PoolLimits
    _missed_since_s: float | None = None
    _idle_since_s: float | None = None
    _changed_at_s: float = -math.inf

    def decide(self, view: PoolView, now: float) -> int:
        """How many workers the pool should have from now on. Called every few seconds.

        A pool outside its limits is brought back at once.
        """
        inside = min(max(view.num_workers, self.limits.min_workers), self.limits.max_workers)
        if inside != view.num_workers:
            return self._change(inside, now)
        self._missed_since_s = _since(self._missed_since_s, view.misses_target, now)
        self._idle_since_s = _since(self._idle_since_s, self._could_do_with_less(view), now)
        if now - self._changed_at_s < COOLDOWN_S:
            return view.num_workers
        if self._missed_since_s is not None and now - self._missed_since_s >= HOLD_UP_S:
            return self._grow(view, now)
        if self._idle_since_s is not None and now - self._idle_since_s >= HOLD_DOWN_S:
            return self._change(view.num_workers - 1, now)
        return view.num_workers

    def _could_do_with_less(self, view: PoolView) -> bool:
        left = view.num_workers - 1
        if left < self.limits.min_workers or view.misses_target:
            return False
        return view.busyness * view.num_workers / left < LOW_BUSYNESS

    def _grow(self, view: PoolView, now: float) -> int:
        """By what the work needs, and at least by one: the target is missed, whatever the rates say.

        Not while others are still to come: what they change is not known yet.
        """
        if view.num_coming:
            return view.num_workers
        needed = math.ceil(view.busyness * view.num_workers / GOOD_BUSYNESS)
        wanted = min(max(needed, view.num_workers + 1), self.limits.max_workers)
        return self._change(wanted, now) if wanted != view.num_workers else view.num_workers

    def _change(self, num_workers: int, now: float) -> int:
        self._changed_at_s = now
        self._missed_since_s = self._idle_since_s = None
        return num_workers


def _since(since_s: float | None, holds: bool, now: float) -> float | None:
    """Since when something has held without a break."""
    if not holds:
        return None
    return now if since_s is None else since_s
