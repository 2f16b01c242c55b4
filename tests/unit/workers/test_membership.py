"""A worker's place in the cluster: what it says, what it does when told, and how it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from kvcache.errors import ConfigError, UnavailableError
from scheduler import controller
from scheduler.controller import ClusterController
from scheduler.events import (
    ActivateWorker,
    ChangeRole,
    Command,
    DrainWorker,
    Event,
    WorkerLeft,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.types import ACTIVE, Duty, DutyState, WorkerLoad, WorkerRole
from tests.builders import make_worker
from tests.leaks import until
from workers import membership
from workers.membership import Membership

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE


class IdleWorker:
    """Says that nothing runs, or that something does."""

    def __init__(self) -> None:
        self.load = WorkerLoad()
        self.times_begun_anew = 0
        self.cache_news = self
        self.moves = False

    def begin_anew(self) -> None:
        self.times_begun_anew += 1

    def move_away(self, *, moves: bool) -> None:
        self.moves = moves

    def report(self, incarnation: int) -> WorkerReported:
        return WorkerReported("a", incarnation, self.load)


class Scheduler:
    """A real controller whose process a test may take away or replace."""

    def __init__(self) -> None:
        self.controller = ClusterController()
        self.is_away = False
        self.fails_at: tuple[type[Event], ...] = ()
        self.heard: list[Event] = []

    async def handle(self, events: Sequence[Event]) -> list[list[Command]]:
        await asyncio.sleep(0)
        if self.is_away:
            raise UnavailableError("away")
        if isinstance(events[0], self.fails_at):
            raise KeyError("a bug in the scheduler")
        self.heard += events
        return [self.controller.handle(event, 0.0) for event in events]

    def duty(self) -> Duty | None:
        return next((each.duty for each in self.controller.snapshot().workers if each.info.worker_id == "a"), None)

    def role(self) -> WorkerRole:
        return next(each.info.role for each in self.controller.snapshot().workers if each.info.worker_id == "a")


class World:
    def __init__(self) -> None:
        self.worker = IdleWorker()
        self.scheduler = Scheduler()
        self.emptied = 0
        self.membership = Membership(cast(Any, self.worker), self.scheduler, self._on_empty)
        for name, role in {"p": PREFILL, "d": DECODE}.items():
            self.scheduler.controller.handle(WorkerRegistered(make_worker(name, role)), 0.0)

    def _on_empty(self) -> None:
        self.emptied += 1


def run(scenario: Callable[[World], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "HEARTBEAT_INTERVAL_S", 0.0)

    async def main() -> None:
        world = World()
        await world.membership.register(make_worker("a", PREFILL))
        beating = asyncio.create_task(world.membership.send_heartbeats())
        await scenario(world)
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)

    asyncio.run(main())


def test_a_worker_takes_the_role_that_it_is_given_and_tells_it_to_the_next_scheduler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(world: World) -> None:
        await world.scheduler.handle([ChangeRole("a", DECODE)])
        await until(lambda: world.membership.info is not None and world.membership.info.role is DECODE, "the role")
        world.scheduler.controller = ClusterController()
        await until(lambda: world.scheduler.duty() == ACTIVE and world.scheduler.role() is DECODE, "to register again")
        assert world.worker.times_begun_anew == 1

    run(scenario, monkeypatch)


def test_a_drain_goes_on_after_a_restart_of_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        world.worker.load = WorkerLoad(running=1)
        await world.scheduler.handle([DrainWorker("a")])
        await until(lambda: world.membership._duty.state is DutyState.DRAINING, "the worker to know")
        world.scheduler.controller = ClusterController()
        await until(lambda: world.scheduler.duty() == Duty(DutyState.DRAINING), "the new scheduler to know")
        world.worker.load = WorkerLoad()
        await until(lambda: world.scheduler.duty() == Duty(DutyState.DRAINED), "the end")
        assert world.emptied == 0, "it was drained, not told to leave"

    run(scenario, monkeypatch)


def test_what_runs_on_a_worker_is_moved_when_the_drain_s_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, and no longer than until it is empty or active again."""

    async def scenario(world: World) -> None:
        world.worker.load = WorkerLoad(running=1)
        await world.scheduler.handle([DrainWorker("a", move_after_s=1e6)])
        await until(lambda: world.membership._duty.state is DutyState.DRAINING, "the worker to know")
        assert not world.worker.moves
        await world.scheduler.handle([DrainWorker("a", move_after_s=0.0)])
        await until(lambda: world.worker.moves, "the move")
        world.worker.load = WorkerLoad()
        await until(lambda: not world.worker.moves, "the end")
        assert world.scheduler.duty() == Duty(DutyState.DRAINED)
        await world.scheduler.handle([ActivateWorker("a")])
        world.worker.load = WorkerLoad(running=1)
        await world.scheduler.handle([DrainWorker("a")])
        await until(lambda: world.membership._duty == Duty(DutyState.DRAINING), "a drain without a limit")
        assert world.membership._moving is not None and world.membership._moving.cancelled() and not world.worker.moves

    run(scenario, monkeypatch)


def test_a_worker_that_shall_leave_does_so_once_it_is_empty_even_if_it_is_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(world: World) -> None:
        world.worker.load = WorkerLoad(blocks_leased=3)
        world.scheduler.controller.handle(WorkerLeft("p", 1), 0.0)
        world.membership.leave_when_empty()
        await until(lambda: world.scheduler.duty() == Duty(DutyState.DRAINING), "the drain")
        assert world.emptied == 0
        world.worker.load = WorkerLoad()
        await until(lambda: world.emptied == 1, "the end")
        await world.membership.leave()
        assert world.scheduler.duty() is None

    run(scenario, monkeypatch)


def test_a_scheduler_that_is_away_stops_neither_heartbeats_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        world.scheduler.is_away = True
        await until(lambda: world.worker.times_begun_anew > 3, "a few heartbeats that nobody took")
        await world.membership.leave()
        world.scheduler.is_away = False
        before = len(world.scheduler.heard)
        await until(lambda: len(world.scheduler.heard) > before, "heartbeats to go on")
        assert world.scheduler.duty() == ACTIVE

    run(scenario, monkeypatch)


def test_a_bug_in_the_scheduler_ends_no_worker_and_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor where it comes with the answer to a heartbeat, when the worker registers again."""

    async def scenario(world: World) -> None:
        world.scheduler.fails_at = (WorkerReported, WorkerLeft)
        await until(lambda: world.worker.times_begun_anew > 3, "a few heartbeats that it could not take")
        await world.membership.leave()
        world.scheduler.fails_at = (WorkerRegistered,)
        world.scheduler.controller = ClusterController()
        told = caplog.text.count("could not take 1 events")
        await until(lambda: caplog.text.count("could not take 1 events") > told + 3, "a few registrations")
        world.scheduler.fails_at = ()
        await until(lambda: world.scheduler.duty() == ACTIVE, "to register again")

    run(scenario, monkeypatch)
    assert "a bug in the scheduler" in caplog.text, "without its traceback"


def test_a_worker_that_does_not_fit_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        other = Membership(cast(Any, world.worker), world.scheduler, lambda: None)
        with pytest.raises(ConfigError, match="model"):
            await other.register(make_worker("b", PREFILL, model="another"))

    run(scenario, monkeypatch)


def test_a_process_that_comes_before_its_predecessor_is_forgotten_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        world.scheduler.controller.handle(WorkerRegistered(make_worker("b", PREFILL, incarnation=2)), 0.0)
        late = Membership(cast(Any, world.worker), world.scheduler, lambda: None)
        registering = asyncio.create_task(late.register(make_worker("b", PREFILL)))
        heard = len(world.scheduler.heard)
        await until(lambda: len(world.scheduler.heard) > heard + 5, "a few attempts")
        assert not registering.done()
        world.scheduler.controller.handle(WorkerLeft("b", 2), 0.0)
        await registering
        assert late.info is not None

    run(scenario, monkeypatch)


def test_a_worker_reports_as_often_as_it_is_told_until_it_registers_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "MAX_HEARTBEAT_INTERVAL_S", 0.01)
    monkeypatch.setattr(controller, "HEARTBEAT_INTERVAL_S", 0.01)

    async def scenario(world: World) -> None:
        await until(lambda: world.membership._interval_s == 0.01, "to be told")
        world.scheduler.controller = ClusterController()
        monkeypatch.setattr(controller, "_PACE_SLACK", 1e9)  # this one has nothing to tell
        await until(lambda: world.membership._interval_s == 0.0, "to forget what another scheduler said")
        assert world.scheduler.duty() == ACTIVE

    run(scenario, monkeypatch)
