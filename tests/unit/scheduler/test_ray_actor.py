"""The actor's clock. Ray itself is not started here: the class is plain."""

from __future__ import annotations

import pytest

from scheduler import ray_actor
from scheduler.admission import AdmissionOptions
from scheduler.events import AskToRegister, WorkerRegistered, WorkerReported
from scheduler.placement import PlacementOptions
from scheduler.ray_actor import SchedulerActor
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
    assert [worker.info.worker_id for worker in actor.snapshot().workers] == ["a"]


def test_a_standstill_of_the_scheduler_removes_nobody(clock: Clock) -> None:
    actor = SchedulerActor(("a",), PlacementOptions(), AdmissionOptions())
    worker = make_worker("a")
    actor.handle([WorkerRegistered(worker)])
    clock.now += 60.0
    assert [each.info.worker_id for each in actor.snapshot().workers] == ["a"]
    (commands,) = actor.handle([WorkerReported("a", worker.incarnation, WorkerLoad())])
    assert not any(isinstance(command, AskToRegister) for command in commands)
