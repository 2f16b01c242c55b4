"""Workers are kept running: a fleet in virtual time, over processes that do as a test says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from engine.fleet import Fleet
from kvcache.errors import ModelError, TwinpoolError, UnavailableError
from kvcache.spec import KVCacheSpec
from scheduler.batching import BatchLimits
from scheduler.events import WorkerLeft
from scheduler.types import ClusterSnapshot, WorkerInfo, WorkerRole
from tests.builders import make_shape, make_worker
from tests.fakes import ManualClock
from workers.load_progress import LoadProgress
from workers.worker_options import WorkerOptions

OPTIONS = WorkerOptions(
    worker_id="decode-0",
    role=WorkerRole.DECODE,
    model_path="/nowhere",
    model_name="tiny",
    spec=KVCacheSpec(1, 1, 16, 16, "float32"),
    num_blocks=4,
    max_model_len=64,
    vocab_size=100,
    dtype="float32",
    limits=BatchLimits(1, 16),
    shape=make_shape(),
)


class FakeProcess:
    """Loads at once and registers at once, unless told otherwise."""

    def __init__(self, options: WorkerOptions, incarnation: int) -> None:
        self.options = options
        self.incarnation = incarnation
        self.error: TwinpoolError | None = None
        self.loads = True
        self.joins = True
        self.is_dead = False
        self.was_told_to_stop = False
        self.is_closed = False

    def progress(self) -> LoadProgress | None:
        if self.error is not None:
            raise self.error
        return LoadProgress(1.0, 0.1, is_ready=True) if self.loads else None

    def join(self) -> WorkerInfo | None:
        if self.error is not None:
            raise self.error
        return make_worker(self.options.worker_id, incarnation=self.incarnation) if self.joins else None

    def has_ended(self) -> bool:
        return self.is_dead

    def has_room(self) -> bool:
        return True

    def stop(self) -> None:
        self.was_told_to_stop = self.is_dead = True

    def close(self) -> None:
        self.is_closed = True


class FakeScheduler:
    def __init__(self) -> None:
        self.told: list[object] = []

    def tell(self, *events: object) -> None:
        self.told += events

    def poll(self) -> ClusterSnapshot | None:
        return None


class World:
    def __init__(self, *names: str) -> None:
        self.clock = ManualClock()
        self.scheduler = FakeScheduler()
        self.started: list[FakeProcess] = []
        self.next_joins = True
        workers = [replace(OPTIONS, worker_id=name) for name in names]
        self.fleet = Fleet(workers, self.start, self.scheduler, self.clock)

    def start(self, options: WorkerOptions, incarnation: int) -> FakeProcess:
        self.started.append(FakeProcess(options, incarnation))
        return self.started[-1]

    def run(self, seconds: float = 1.0) -> None:
        until = self.clock.now_s + seconds
        while self.clock.now_s <= until:
            self.fleet.step()
            self.clock.now_s += 0.2

    def newest(self, worker_id: str = "decode-0") -> FakeProcess:
        return next(each for each in reversed(self.started) if each.options.worker_id == worker_id)


def test_all_workers_start_at_once_and_register_one_after_the_other() -> None:
    world = World("a", "b")
    world.fleet.step()
    assert [each.options.worker_id for each in world.started] == ["a", "b"]
    world.newest("a").joins = False
    world.run()
    assert not world.fleet.is_complete
    assert world.fleet.members["b"].info is None, "both measured at the same time"
    world.newest("a").joins = True
    world.run()
    assert world.fleet.is_complete


def test_a_worker_that_ended_is_started_again_under_a_higher_number() -> None:
    world = World("decode-0")
    world.run()
    world.newest().is_dead = True
    world.run(3)
    assert [each.incarnation for each in world.started] == [1, 2]
    assert world.started[0].is_closed, "its room was not given back"
    assert world.scheduler.told == [WorkerLeft("decode-0", 1)]
    assert world.fleet.is_complete


def test_a_worker_that_crashes_again_and_again_waits_longer_each_time() -> None:
    world = World("decode-0")
    starts: list[float] = []
    while world.clock.now_s < 40:
        world.run(0.1)
        if world.newest().incarnation > len(starts):
            starts.append(world.clock.now_s)
            world.newest().is_dead = True
    pauses = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert pauses == pytest.approx([1, 2, 4, 8, 16], abs=0.7)


def test_a_node_without_room_is_no_failure() -> None:
    world = World("decode-0")
    world.fleet.step()
    world.newest().loads = False
    world.run(600)
    assert len(world.started) == 1
    world.newest().loads = True
    world.run()
    assert world.fleet.is_complete


def test_one_worker_s_end_touches_no_other() -> None:
    world = World("a", "b")
    world.run()
    world.newest("a").is_dead = True
    world.run(5)
    assert [each.options.worker_id for each in world.started] == ["a", "b", "a"]


@pytest.mark.parametrize("error", [ModelError("The model is damaged."), UnavailableError("gone")])
def test_why_a_worker_could_not_start_is_kept(error: TwinpoolError) -> None:
    world = World("decode-0")
    world.fleet.step()
    world.newest().error = error
    world.fleet.step()
    member = world.fleet.members["decode-0"]
    assert (member.failure, member.process, world.newest().is_closed) == (error, None, True)


def test_closing_stops_all_and_gives_their_room_back() -> None:
    world = World("a", "b")
    world.run()
    world.fleet.close(timeout_s=1.0)
    assert all(each.was_told_to_stop and each.is_closed for each in world.started)
