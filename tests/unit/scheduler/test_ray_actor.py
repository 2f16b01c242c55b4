"""The actor's clock. Ray itself is not started here: the class is plain."""

from __future__ import annotations

import pytest

from scheduler import ray_actor
from scheduler.admission import AdmissionOptions
from scheduler.events import AskToRegister, WorkerRegistered, WorkerReported
from scheduler.placement import PlacementOptions
from scheduler.ray_actor import Pages, SchedulerActor
from scheduler.types import WorkerLoad
from tests.builders import make_worker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return round(self.now * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ray_actor, "time", clock)
    return clock


def test_a_worker_that_falls_silent_while_others_speak_is_removed(clock: Clock) -> None:
    actor = SchedulerActor(("a", "b"), PlacementOptions(), AdmissionOptions())
    speaking, silent = make_worker("a"), make_worker("b")
    actor.handle([WorkerRegistered(speaking), WorkerRegistered(silent)])
    for _ in range(14):
        clock.now += 0.5
        actor.handle([WorkerReported("a", speaking.incarnation, WorkerLoad())])
    assert [worker.info.worker_id for worker in actor.page("").workers] == ["a"]


def test_a_standstill_of_the_scheduler_removes_nobody(clock: Clock) -> None:
    actor = SchedulerActor(("a",), PlacementOptions(), AdmissionOptions())
    worker = make_worker("a")
    actor.handle([WorkerRegistered(worker)])
    clock.now += 60.0
    assert [each.info.worker_id for each in actor.page("").workers] == ["a"]
    (commands,) = actor.handle([WorkerReported("a", worker.incarnation, WorkerLoad())])
    assert not any(isinstance(command, AskToRegister) for command in commands)


def test_a_snapshot_in_pages_is_the_whole(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actor, "PAGE_WORKERS", 3)
    actor = SchedulerActor(("a", "z"), PlacementOptions(), AdmissionOptions())
    for number in (5, 2, 0, 6, 1, 3, 4):
        actor.handle([WorkerRegistered(make_worker(f"w{number}"))])
        pages, snapshot = Pages(), None
        while snapshot is None:
            snapshot = pages.add(actor.page(pages.after))
        assert snapshot == actor._admission.snapshot()


def test_pages_of_a_scheduler_that_was_restarted_are_begun_anew(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actor, "PAGE_WORKERS", 1)
    before = SchedulerActor((), PlacementOptions(), AdmissionOptions())
    before.handle([WorkerRegistered(make_worker(name)) for name in "ab"])
    pages = Pages()
    assert pages.add(before.page(pages.after)) is None
    clock.now += 1.0
    after = SchedulerActor((), PlacementOptions(), AdmissionOptions())
    assert pages.add(after.page(pages.after)) is None
    assert pages.add(after.page(pages.after)) == after.page("")
