"""Workers are kept running: a fleet in virtual time, over processes that do as a test says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from engine.autoscaling import TELL_INTERVAL_S, Autoscaling
from engine.fleet import JOIN_TIMEOUT_S, Fleet
from engine.node_requests import EXPIRY_S
from kvcache.errors import ModelError, RequestError, TwinpoolError, UnavailableError
from scheduler.autoscaler import PoolLimits
from scheduler.events import DrainWorker, WorkerLeft, WorkersExpected
from scheduler.types import (
    ClusterSnapshot,
    Duty,
    DutyState,
    PoolLoad,
    WorkerInfo,
    WorkerLoad,
    WorkerRole,
    WorkerSnapshot,
)
from tests.builders import make_options, make_worker
from tests.fakes import FakeNodeMarket, ManualClock
from workers.load_progress import LoadProgress
from workers.worker_options import WorkerOptions

OPTIONS = make_options()


class FakeProcess:
    """Loads at once and registers at once, unless told otherwise."""

    def __init__(self, options: WorkerOptions, incarnation: int) -> None:
        self.options = options
        self.incarnation = incarnation
        self.error: Exception | None = None
        self.cannot_be_closed = False
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
        if self.cannot_be_closed:
            raise RuntimeError("it does not close")
        self.is_closed = True


class FakeScheduler:
    def tell(self, *events: object) -> None:
        self.told += events

    def __init__(self) -> None:
        self.told: list[object] = []
        self.cluster: ClusterSnapshot | None = None

    def poll(self) -> ClusterSnapshot | None:
        return self.cluster

    def expects(self) -> tuple[str, ...]:
        return [each for each in self.told if isinstance(each, WorkersExpected)][-1].worker_ids


class World:
    def __init__(self, *names: str) -> None:
        self.clock = ManualClock()
        self.scheduler = FakeScheduler()
        self.started: list[FakeProcess] = []
        self.cannot_start: set[str] = set()
        roles = {"p": WorkerRole.PREFILL, "d": WorkerRole.DECODE}
        workers = [replace(OPTIONS, worker_id=name, role=roles.get(name[0], WorkerRole.DECODE)) for name in names]
        self.fleet = Fleet(workers, self.start, self.scheduler, self.clock)

    def start(self, options: WorkerOptions, incarnation: int) -> FakeProcess:
        if options.worker_id in self.cannot_start:
            raise RuntimeError("no process")
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


def test_nobody_measures_while_others_load() -> None:
    world = World("a", "b")
    world.fleet.step(joining=False)
    world.newest("b").loads = False
    for _ in range(5):
        world.fleet.step(joining=world.fleet.is_loaded)
    assert world.fleet.members["a"].info is None
    world.newest("b").loads = True
    for _ in range(5):
        world.fleet.step(joining=world.fleet.is_loaded)
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


def test_one_that_measures_is_not_joined_by_another_that_comes_before_it_in_line() -> None:
    world = World("a", "b")
    world.fleet.step()
    world.newest("a").loads = False
    world.newest("b").joins = False
    world.run()
    world.newest("a").loads = True
    world.run()
    assert world.fleet.members["a"].info is None, "both measured at the same time"
    world.newest("b").joins = True
    world.run()
    assert world.fleet.is_complete


def test_a_worker_that_hangs_while_it_joins_is_given_up_and_the_next_one_joins() -> None:
    world = World("a", "b")
    world.fleet.step()
    world.newest("a").joins = False
    world.run(JOIN_TIMEOUT_S - 1)
    assert world.fleet.members["b"].info is None
    world.run(5)
    assert world.started[0].is_closed, "its room was not given back"
    assert world.fleet.is_complete
    assert [each.incarnation for each in world.started if each.options.worker_id == "a"] == [1, 2]


@pytest.mark.parametrize("how", ["start", "load", "close"])
def test_an_unexpected_error_with_one_worker_stops_no_other_and_is_not_met_again_at_once(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = World("a", "b")
    world.run()
    if how == "start":
        world.cannot_start.add("a")
    if how == "load":
        world.fleet.members["a"].progress = LoadProgress()
        world.newest("a").error = RuntimeError("it does not load")
    if how == "close":
        world.newest("a").cannot_be_closed = True
    world.newest("a").is_dead = how != "load"
    world.newest("b").is_dead = True
    world.run(60)
    assert world.fleet.members["b"].info is not None
    assert world.fleet.members["b"].num_starts == 2
    assert world.fleet.members["a"].num_starts <= 7, "without a pause"
    assert "RuntimeError" in caplog.text, "without its traceback"
    world.cannot_start.clear()
    world.run(60)
    assert world.fleet.is_complete


def test_closing_goes_on_past_a_process_that_does_not_close() -> None:
    world = World("a", "b")
    world.run()
    world.newest("a").cannot_be_closed = True
    world.fleet.close(timeout_s=1.0)
    assert world.newest("b").is_closed


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


# Scaling

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
TARGETS = {PREFILL: 1.0, DECODE: 0.1}


def view(*workers: WorkerSnapshot, epoch: int = 1) -> ClusterSnapshot:
    return ClusterSnapshot(workers, epoch=epoch)


def seen(
    name: str, role: WorkerRole = DECODE, state: DutyState = DutyState.ACTIVE, in_flight: int = 0
) -> WorkerSnapshot:
    return WorkerSnapshot(make_worker(name, role), WorkerLoad(), in_flight, 0, 0, 0.0, duty=Duty(state))


def test_a_pool_grows_by_workers_like_its_first() -> None:
    world = World("prefill-0", "decode-0")
    world.run()
    world.fleet.scale({DECODE: 3})
    world.run()
    assert [each.options.worker_id for each in world.started] == ["prefill-0", "decode-0", "decode-1", "decode-2"]
    assert world.newest("decode-2").options.role is DECODE
    assert world.fleet.is_complete


def test_a_worker_that_is_too_many_drains_and_ends_and_is_forgotten() -> None:
    world = World("prefill-0", "decode-0", "decode-1")
    world.run()
    busy, idle = seen("decode-1", in_flight=4), seen("decode-0")
    world.scheduler.cluster = view(busy, idle)
    world.run()
    world.fleet.scale({DECODE: 1})
    world.run()
    assert DrainWorker("decode-0", force=True) in world.scheduler.told
    assert not world.newest("decode-0").was_told_to_stop, "stopped before it was empty"
    world.scheduler.cluster = view(busy, seen("decode-0", state=DutyState.DRAINED))
    world.run()
    assert world.newest("decode-0").was_told_to_stop and world.newest("decode-0").is_closed
    assert list(world.fleet.members) == ["prefill-0", "decode-1"]
    assert world.scheduler.expects() == ("prefill-0", "decode-1")
    assert not any(isinstance(each, WorkerLeft) for each in world.scheduler.told), "it says so itself"


def test_a_drain_is_ordered_again_until_the_scheduler_has_heard_it() -> None:
    world = World("prefill-0", "decode-0", "decode-1")
    world.run()
    world.scheduler.cluster = view(seen("decode-0"), seen("decode-1"))
    world.fleet.scale({DECODE: 1})
    world.run()
    orders = [each for each in world.scheduler.told if isinstance(each, DrainWorker)]
    assert len(orders) > 2
    assert {each.worker_id for each in orders} == {"decode-1"}, "the newest of equals leaves"


def test_a_worker_that_does_not_run_leaves_at_once() -> None:
    world = World("prefill-0", "decode-0", "decode-1")
    world.run()
    world.newest("decode-1").is_dead = True
    world.fleet.step()
    world.fleet.scale({DECODE: 1})
    world.run(5)
    assert list(world.fleet.members) == ["prefill-0", "decode-0"]
    assert len(world.started) == 3


def test_a_worker_that_changed_its_role_counts_and_restarts_in_the_new_one() -> None:
    world = World("prefill-0", "prefill-1", "decode-0")
    world.run()
    world.scheduler.cluster = view(seen("prefill-0", PREFILL), seen("prefill-1", DECODE), seen("decode-0"))
    world.run()
    assert (world.fleet.num_workers(PREFILL), world.fleet.num_workers(DECODE)) == (1, 2)
    world.newest("prefill-1").is_dead = True
    world.run(3)
    assert world.newest("prefill-1").options.role is DECODE


def test_a_scheduler_that_was_restarted_is_told_which_workers_there_shall_be() -> None:
    world = World("prefill-0", "decode-0")
    world.scheduler.cluster = view(epoch=1)
    world.run()
    world.scheduler.told.clear()
    world.run()
    assert world.scheduler.told == []
    world.scheduler.cluster = view(epoch=2)
    world.run()
    assert world.scheduler.told == [WorkersExpected(("prefill-0", "decode-0"))]


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({DECODE: 0}, "1 prefill, 0 decode"),
        ({DECODE: 0, PREFILL: 0}, "0 prefill, 0 decode and 0 colocated"),
        ({WorkerRole.COLOCATED: 1}, "without colocated workers"),
    ],
)
def test_numbers_that_cannot_serve_are_refused_and_change_nothing(counts: dict[WorkerRole, int], words: str) -> None:
    world = World("prefill-0", "decode-0")
    world.run()
    with pytest.raises(RequestError, match=words):
        world.fleet.scale(counts)
    world.run()
    assert len(world.fleet.members) == 2


def test_a_fleet_that_scales_by_itself_starts_what_is_needed_and_asks_ray_for_it() -> None:
    world = World("prefill-0", "decode-0")
    nodes = FakeNodeMarket()
    world.fleet._autoscaling = Autoscaling({DECODE: PoolLimits(1, 3)}, TARGETS, nodes)
    world.scheduler.cluster = replace(view(seen("decode-0")), pools=(PoolLoad(DECODE, 1, 0.5, 1.3),))
    world.run(30)
    assert sorted(world.fleet.members) == ["decode-0", "decode-1", "prefill-0"]
    assert list(dict.fromkeys(map(len, nodes.asked))) == [2, 3]
    world.fleet.close(timeout_s=0.0)
    assert nodes.asked[-1] == []


def autoscaled_world(busyness: float) -> tuple[World, FakeNodeMarket]:
    """Its decode pool, of two of at most three workers, misses its target where it is busy."""
    world, nodes = World("prefill-0", "decode-0", "decode-1"), FakeNodeMarket()
    world.fleet._autoscaling = Autoscaling({DECODE: PoolLimits(1, 3)}, TARGETS, nodes)
    world.scheduler.cluster = replace(view(), pools=(PoolLoad(DECODE, 2, busyness / 2, busyness),))
    world.run()
    assert world.fleet.is_complete
    return world, nodes


def test_nodes_are_asked_for_again_while_a_worker_waits_for_its_node() -> None:
    """Who is silent for a minute is taken to need nothing, and its nodes may go."""
    world, nodes = autoscaled_world(busyness=0.1)
    world.fleet.scale({DECODE: 3})
    world.fleet.step()
    world.newest("decode-2").loads = False
    nodes.asked.clear()
    world.run(EXPIRY_S)
    assert not world.fleet.is_complete
    assert [len(each) for each in nodes.asked].count(4) >= EXPIRY_S / TELL_INTERVAL_S - 1


def test_nodes_are_asked_for_again_while_the_scheduler_says_nothing() -> None:
    world, nodes = autoscaled_world(busyness=0.1)
    world.scheduler.cluster = None
    nodes.asked.clear()
    world.run(EXPIRY_S)
    assert len(nodes.asked) >= EXPIRY_S / TELL_INTERVAL_S - 1


def test_a_worker_that_crashes_again_and_again_keeps_no_pool_from_growing() -> None:
    world, _nodes = autoscaled_world(busyness=1.4)
    for _ in range(400):
        world.newest("decode-1").is_dead = True
        world.run(0.2)
    assert world.fleet.num_workers(DECODE) == 3
