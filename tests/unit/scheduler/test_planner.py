"""Roles that follow the load: the best split against all splits, and hysteresis in virtual time."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from scheduler.planner import (
    HOLD_S,
    MIN_BUSYNESS,
    MIN_GAIN,
    MIN_STAY_S,
    Candidate,
    Demand,
    Flip,
    RolePlanner,
    best_split,
    busyness,
)
from scheduler.types import WorkerRole

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
EVERY_S = 2.0


def worker(name: str, role: WorkerRole, prefill: float = 1000.0, decode: float = 100.0) -> Candidate:
    return Candidate(name, role, prefill, decode)


def with_roles(workers: Sequence[Candidate], roles: dict[str, WorkerRole]) -> list[Candidate]:
    return [replace(each, role=roles[each.worker_id]) for each in workers]


def best_of_all_splits(workers: Sequence[Candidate], demand: Demand) -> float:
    """Slow reference: every assignment with both roles in it."""
    names = [each.worker_id for each in workers]
    return min(
        busyness(with_roles(workers, dict(zip(names, roles, strict=True))), demand)
        for roles in itertools.product((PREFILL, DECODE), repeat=len(workers))
        if len(set(roles)) == 2
    )


def test_work_is_split_by_what_devices_are_better_at() -> None:
    workers = [worker("a", DECODE, prefill=4000), worker("b", PREFILL, decode=400), worker("c", DECODE)]
    split = best_split(workers, Demand(3000, 300))
    assert (split["a"], split["b"]) == (PREFILL, DECODE)


def test_equal_workers_split_as_well_as_the_best_of_all_splits() -> None:
    for num_workers, (prefill, decode) in itertools.product(range(2, 8), [(100, 100), (5000, 20), (50, 600), (0, 9)]):
        workers = [worker(str(index), DECODE) for index in range(num_workers)]
        demand = Demand(prefill, decode)
        assert busyness(with_roles(workers, best_split(workers, demand)), demand) == best_of_all_splits(workers, demand)


def test_unlike_workers_split_nearly_as_well_as_the_best_of_all_splits() -> None:
    """Whole workers cannot be cut, so a cut by advantage may miss the optimum by a part of one worker."""
    rng = random.Random(5)
    ratios = []
    for _ in range(100):
        workers = [
            worker(str(index), rng.choice((PREFILL, DECODE)), rng.uniform(200, 4000), rng.uniform(20, 400))
            for index in range(rng.randint(2, 7))
        ]
        demand = Demand(rng.uniform(10, 8000), rng.uniform(5, 800))
        found = busyness(with_roles(workers, best_split(workers, demand)), demand)
        ratios.append(found / best_of_all_splits(workers, demand))
    assert min(ratios) >= 1.0 - 1e-9
    assert sum(ratios) / len(ratios) < 1.1


def test_of_equally_good_splits_the_one_with_the_fewest_changes_is_taken() -> None:
    workers = [worker("a", DECODE), worker("b", PREFILL), worker("c", DECODE)]
    assert best_split(workers, Demand(500, 100)) == {"a": DECODE, "b": PREFILL, "c": DECODE}


def test_a_single_worker_keeps_its_role() -> None:
    assert best_split([worker("a", DECODE)], Demand(1000, 0)) == {"a": DECODE}


def slow_best_split(workers: Sequence[Candidate], demand: Demand) -> dict[str, WorkerRole]:
    """Slow reference: each cut of the order by advantage, looked at from the beginning."""

    def key(each: Candidate) -> tuple[float, bool, str]:
        return -each.prefill_tokens_s / each.decode_tokens_s, each.role is DECODE, each.worker_id

    names = [each.worker_id for each in sorted(workers, key=key)]
    splits = [
        {name: PREFILL if place < cut else DECODE for place, name in enumerate(names)} for cut in range(1, len(names))
    ]

    def badness(split: dict[str, WorkerRole]) -> tuple[float, int]:
        return busyness(with_roles(workers, split), demand), sum(
            split[each.worker_id] is not each.role for each in workers
        )

    return min(splits, key=badness)


def slow_flips(workers: Sequence[Candidate], demand: Demand) -> dict[str, float]:
    """How busy the busier phase is after each step towards the best split, by worker."""
    split = slow_best_split(workers, demand)
    roles = {each.worker_id: each.role for each in workers}
    return {
        name: busyness(with_roles(workers, roles | {name: role}), demand)
        for name, role in split.items()
        if roles[name] is not role
    }


def draw_workers(rng: random.Random, count: int) -> list[Candidate]:
    """Rates are whole numbers: sums are exact in any order."""
    return [
        worker(str(index), rng.choice((PREFILL, DECODE)), rng.randint(2, 40) * 100, rng.randint(2, 40) * 10)
        for index in range(count)
    ]


def test_the_split_and_the_flip_are_those_of_the_slow_reference() -> None:
    rng = random.Random(7)
    num_flips = 0
    for _ in range(100):
        workers = draw_workers(rng, rng.randint(2, 40))
        demand = Demand(rng.randint(1, 60_000), rng.randint(1, 6_000))
        assert best_split(workers, demand) == slow_best_split(workers, demand)
        planner = RolePlanner()
        for now in (0.0, MIN_STAY_S, MIN_STAY_S + HOLD_S):
            flip = planner.decide(workers, demand, now)
        present, after = busyness(workers, demand), slow_flips(workers, demand)
        name = min(after, key=lambda each: (after[each], each), default=None)
        pays = name is not None and present >= MIN_BUSYNESS and after[name] <= present * (1 - MIN_GAIN)
        assert (flip.worker_id if flip is not None else None) == (name if pays else None)
        num_flips += pays
    assert num_flips > 20


def test_planning_looks_at_each_worker_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()

    def read(self: Candidate, name: str) -> object:
        reads[name] += 1
        return object.__getattribute__(self, name)

    workers, planner = draw_workers(random.Random(3), 1000), RolePlanner()
    monkeypatch.setattr(Candidate, "__getattribute__", read, raising=False)
    for now in (0.0, MIN_STAY_S, MIN_STAY_S + HOLD_S):
        planner.decide(workers, Demand(1_600_000, 20_000), now)
    assert 0 < reads.total() <= 3 * 40 * len(workers)


class Run:
    """A planner asked every two seconds, whose flips take effect at once."""

    def __init__(self, *workers: Candidate) -> None:
        self.workers = list(workers)
        self.planner = RolePlanner()
        self.now = 0.0
        self.flips: list[tuple[float, Flip]] = []

    def go(self, seconds: float, demand: Demand) -> None:
        until = self.now + seconds
        while self.now < until:
            flip = self.planner.decide(self.workers, demand, self.now)
            if flip is not None:
                self.flips.append((self.now, flip))
                self.workers = with_roles(
                    self.workers, {each.worker_id: each.role for each in self.workers} | {flip.worker_id: flip.role}
                )
            self.now += EVERY_S

    @property
    def num_prefill(self) -> int:
        return sum(each.role is PREFILL for each in self.workers)


PROMPTS, ANSWERS = Demand(2600, 60), Demand(600, 280)  # of one kind of load, and of the other


def four_workers() -> Run:
    return Run(worker("a", PREFILL), worker("b", PREFILL), worker("c", DECODE), worker("d", DECODE))


def test_roles_follow_the_mix_of_the_load_when_it_turns() -> None:
    run = four_workers()
    run.go(300, PROMPTS)
    assert run.num_prefill == 3
    run.go(300, ANSWERS)
    assert run.num_prefill == 1


def test_a_gain_that_does_not_last_moves_nobody() -> None:
    run = four_workers()
    run.go(MIN_STAY_S, Demand(100, 10))
    for _ in range(20):
        run.go(HOLD_S - EVERY_S, PROMPTS)
        run.go(HOLD_S, Demand(1000, 100))
    assert run.flips == []


def test_a_worker_stays_for_a_while() -> None:
    run = four_workers()
    for _ in range(40):
        run.go(20, PROMPTS)
        run.go(20, ANSWERS)
    times: dict[str, list[float]] = {}
    for at_s, flip in run.flips:
        times.setdefault(flip.worker_id, []).append(at_s)
    assert times
    assert all(later - earlier >= MIN_STAY_S for each in times.values() for earlier, later in itertools.pairwise(each))


def test_a_cluster_with_little_to_do_is_left_alone() -> None:
    run = four_workers()
    run.go(600, Demand(300, 1))
    assert run.flips == []


def test_a_small_gain_moves_nobody() -> None:
    run = Run(*(worker(str(index), PREFILL if index < 10 else DECODE) for index in range(20)))
    run.go(600, Demand(9500, 900))
    assert run.flips == []


@pytest.mark.parametrize("demand", [Demand(9000, 0), Demand(0, 900)])
def test_one_of_each_role_stays(demand: Demand) -> None:
    run = four_workers()
    run.go(2000, demand)
    assert run.num_prefill == (3 if demand.prefill_tokens_s else 1)
