"""Events in, commands out: the cluster in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler import controller
from scheduler.controller import ClusterController
from scheduler.events import (
    AskToRegister,
    BeatEvery,
    Command,
    Event,
    PlaceRequest,
    PrefillDone,
    RefuseRequest,
    RefuseWorker,
    RequestArrived,
    RequestEnded,
    Tick,
    WorkerLeft,
    WorkerRegistered,
    WorkerRemoved,
    WorkerReported,
)
from scheduler.placement import PlacementOptions
from scheduler.types import StepTimes, WorkerInfo, WorkerLoad, WorkerRole, WorkerSnapshot
from tests.builders import make_spec, make_worker

PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
TIMEOUT_S = 5.0
LOAD = WorkerLoad(running=3, waiting=2, blocks_free=7)


class Cluster:
    """A controller and its clock."""

    def __init__(self, *workers: WorkerInfo, expected: tuple[str, ...] = (), policy: str = "least_loaded") -> None:
        self.controller = ClusterController(expected, TIMEOUT_S, PlacementOptions(policy))
        self.now = 100.0
        for worker in workers:
            assert self.handle(WorkerRegistered(worker)) == []

    def handle(self, event: Event) -> list[Command]:
        return self.controller.handle(event, self.now)

    def arrive(self, request_id: str = "r", prompt: int = 10, max_tokens: int = 5, avoid: tuple[str, ...] = ()) -> str:
        """Returns "prefill worker > decode worker"."""
        (command,) = self.handle(RequestArrived(request_id, prompt, max_tokens, avoid))
        assert isinstance(command, PlaceRequest)
        placement = command.placement
        assert placement.request_id == request_id
        return (
            f"{placement.prefill.worker_id} > {placement.decode.worker_id}"
            if placement.prefill
            else (placement.decode.worker_id)
        )

    def worker(self, worker_id: str) -> WorkerSnapshot:
        (found,) = [each for each in self.controller.snapshot().workers if each.info.worker_id == worker_id]
        return found

    def in_flight(self, worker_id: str) -> tuple[int, int]:
        worker = self.worker(worker_id)
        return worker.requests_in_flight, worker.tokens_in_flight

    @property
    def worker_ids(self) -> list[str]:
        return [worker.info.worker_id for worker in self.controller.snapshot().workers]


def split_cluster() -> Cluster:
    return Cluster(make_worker("p", PREFILL), make_worker("d", DECODE))


# Placing and counting


def test_a_request_counts_on_both_workers_until_its_phases_are_over() -> None:
    cluster = split_cluster()
    assert cluster.arrive(prompt=10, max_tokens=5) == "p > d"
    assert (cluster.in_flight("p"), cluster.in_flight("d")) == ((1, 10), (1, 15))
    cluster.handle(PrefillDone("r"))
    assert (cluster.in_flight("p"), cluster.in_flight("d")) == ((0, 0), (1, 15))
    cluster.handle(RequestEnded("r"))
    assert (cluster.in_flight("p"), cluster.in_flight("d")) == ((0, 0), (0, 0))


def test_a_request_that_ends_before_its_prefill_is_over_counts_nowhere() -> None:
    cluster = split_cluster()
    cluster.arrive()
    cluster.handle(RequestEnded("r"))
    assert (cluster.in_flight("p"), cluster.in_flight("d")) == ((0, 0), (0, 0))


def test_a_request_prefilled_in_place_counts_until_it_ends() -> None:
    cluster = Cluster(make_worker("c"))
    assert cluster.arrive(prompt=10, max_tokens=5) == "c"
    cluster.handle(PrefillDone("r"))
    assert cluster.in_flight("c") == (1, 15)
    cluster.handle(RequestEnded("r"))
    assert cluster.in_flight("c") == (0, 0)


def test_a_placement_knows_what_the_heartbeat_just_before_it_told() -> None:
    """It would be the other worker's turn, but that has told that its steps take a second."""
    cluster = Cluster(make_worker("p", PREFILL), make_worker("d0", DECODE), make_worker("d1", DECODE), policy="cost")
    steps = StepTimes(1, prompt_tokens=0, prompt_pairs=0, decode_tokens=1, context_tokens=10, seconds=1.0)
    assert cluster.arrive("r0").endswith("d0")
    cluster.handle(RequestEnded("r0"))
    cluster.now += 1.0
    cluster.handle(WorkerReported("d1", 1, WorkerLoad(), (steps,)))
    assert cluster.arrive("r1").endswith("d0")


@pytest.mark.parametrize("event", [PrefillDone("r"), RequestEnded("r")])
def test_an_event_told_twice_counts_once(event: Event) -> None:
    cluster = split_cluster()
    cluster.arrive("r")
    cluster.arrive("other", prompt=3, max_tokens=4)
    for _ in range(2):
        assert cluster.handle(event) == []
    assert cluster.in_flight("p") == (1, 3)


@pytest.mark.parametrize("event", [PrefillDone("unknown"), RequestEnded("unknown")])
def test_an_event_of_an_unknown_request_changes_nothing(event: Event) -> None:
    cluster = split_cluster()
    before = cluster.controller.snapshot()
    assert cluster.handle(event) == []
    assert cluster.controller.snapshot() == before


def test_equal_idle_workers_take_turns() -> None:
    cluster = Cluster(*(make_worker(name) for name in "abc"))
    chosen = []
    for index in range(6):
        chosen.append(cluster.arrive(f"r{index}"))
        cluster.handle(RequestEnded(f"r{index}"))
    assert chosen == ["a", "b", "c", "a", "b", "c"]


def test_work_is_shared_in_proportion_to_the_measured_rate() -> None:
    """Thirty equal requests on devices of 10, 20 and 30 GB/s: 5, 10 and 15 keep all equally busy."""
    rates = {"a": 10.0, "b": 20.0, "c": 30.0}
    cluster = Cluster(*(make_worker(name, read_gb_s=rate) for name, rate in rates.items()))
    for index in range(30):
        cluster.arrive(f"r{index}")
    assert {name: cluster.in_flight(name)[0] for name in rates} == {"a": 5, "b": 10, "c": 15}


def test_a_long_prompt_weighs_more_than_short_ones() -> None:
    cluster = Cluster(make_worker("a"), make_worker("b"))
    assert cluster.arrive("long", prompt=100) == "a"
    assert [cluster.arrive(f"short{index}", prompt=10) for index in range(3)] == ["b", "b", "b"]


def test_a_worker_that_the_request_failed_on_is_avoided() -> None:
    cluster = Cluster(make_worker("a"), make_worker("b"))
    cluster.arrive("other", prompt=1000)
    assert cluster.in_flight("a")[0] == 1
    assert cluster.arrive("r", avoid=("b",)) == "a"


@pytest.mark.parametrize(("roles", "phase"), [((), "decode"), ((PREFILL,), "decode"), ((DECODE,), "prefill")], ids=repr)
def test_a_request_without_a_worker_is_refused_and_counts_nowhere(roles: tuple[WorkerRole, ...], phase: str) -> None:
    cluster = Cluster(*(make_worker(role.value, role) for role in roles))
    before = cluster.controller.snapshot()
    (command,) = cluster.handle(RequestArrived("r", 10, 5))
    assert command == RefuseRequest("r", f"No {phase} worker is available.")
    assert cluster.controller.snapshot() == before


# Registration


def test_a_worker_with_other_blocks_and_another_kv_dtype_is_welcome() -> None:
    """The handoff converts."""
    cluster = Cluster(make_worker("p", PREFILL))
    other = replace(make_worker("d", DECODE), spec=make_spec(block_size=8, dtype="bfloat16"))
    assert cluster.handle(WorkerRegistered(other)) == []
    assert sorted(cluster.worker_ids) == ["d", "p"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"spec": make_spec(num_layers=3)}, "num_layers"),
        ({"spec": make_spec(num_kv_heads=1)}, "num_kv_heads"),
        ({"spec": make_spec(head_size=8)}, "head_size"),
        ({"model": "another"}, "model"),
        ({"vocab_size": 7}, "vocab_size"),
        ({"version": "0.0.1"}, "version"),
        ({"checkpoint": "another"}, "checkpoint"),
    ],
)
def test_a_worker_that_does_not_fit_the_others_is_refused_by_the_name_of_the_field(
    change: dict[str, object], field: str
) -> None:
    cluster = Cluster(make_worker("p", PREFILL))
    (command,) = cluster.handle(WorkerRegistered(replace(make_worker("d", DECODE), **change)))
    assert isinstance(command, RefuseWorker)
    assert (command.worker_id, command.is_final) == ("d", True)
    assert field in command.message
    assert cluster.worker_ids == ["p"]


def test_a_worker_that_exchanges_no_kv_may_have_a_cache_of_its_own() -> None:
    cluster = split_cluster()
    assert cluster.handle(WorkerRegistered(make_worker("c", COLOCATED, spec=make_spec(block_size=8)))) == []
    assert cluster.worker_ids == ["c", "d", "p"]


def test_registering_again_keeps_the_counts() -> None:
    cluster = split_cluster()
    cluster.arrive()
    cluster.now += 3.0
    cluster.handle(WorkerRegistered(make_worker("d", DECODE)))
    assert (cluster.in_flight("d"), cluster.worker("d").last_heard_s) == ((1, 15), 103.0)


def test_a_restarted_worker_replaces_its_earlier_process() -> None:
    cluster = split_cluster()
    cluster.arrive()
    assert cluster.handle(WorkerRegistered(make_worker("d", DECODE, incarnation=2))) == []
    assert (cluster.worker("d").info.incarnation, cluster.in_flight("d")) == (2, (0, 0))


def test_a_restarted_worker_may_come_back_with_another_cache_if_it_is_alone() -> None:
    cluster = Cluster(make_worker("d", DECODE))
    changed = make_worker("d", DECODE, incarnation=2, spec=make_spec(block_size=8))
    assert cluster.handle(WorkerRegistered(changed)) == []
    assert cluster.worker("d").info == changed


def test_an_earlier_process_cannot_register_over_its_successor() -> None:
    cluster = Cluster(make_worker("d", DECODE, incarnation=2))
    (command,) = cluster.handle(WorkerRegistered(make_worker("d", DECODE, incarnation=1)))
    assert isinstance(command, RefuseWorker)
    assert (command.is_final, cluster.worker("d").info.incarnation) == (False, 2)


@pytest.mark.parametrize("event", [RequestEnded("r"), PrefillDone("r")])
def test_a_late_event_does_not_count_against_a_worker_that_was_replaced(event: Event) -> None:
    cluster = split_cluster()
    cluster.arrive()
    for name, role in (("p", PREFILL), ("d", DECODE)):
        cluster.handle(WorkerRegistered(make_worker(name, role, incarnation=2)))
    cluster.handle(event)
    assert (cluster.in_flight("p"), cluster.in_flight("d")) == ((0, 0), (0, 0))


def test_a_late_event_of_a_worker_that_is_gone_changes_nothing() -> None:
    cluster = split_cluster()
    cluster.arrive()
    cluster.handle(WorkerLeft("d", 1))
    assert cluster.handle(RequestEnded("r")) == []
    assert cluster.in_flight("p") == (0, 0)


# Heartbeats


def test_a_heartbeat_brings_load_and_life() -> None:
    cluster = split_cluster()
    cluster.now += 2.0
    assert cluster.handle(WorkerReported("d", 1, LOAD)) == []
    assert (cluster.worker("d").load, cluster.worker("d").last_heard_s) == (LOAD, 102.0)


@pytest.mark.parametrize(("worker_id", "incarnation"), [("unknown", 1), ("d", 2)])
def test_a_worker_that_reports_before_it_registered_is_asked_to(worker_id: str, incarnation: int) -> None:
    cluster = split_cluster()
    assert cluster.handle(WorkerReported(worker_id, incarnation, LOAD)) == [AskToRegister(worker_id)]
    assert cluster.worker("d").load == WorkerLoad(blocks_free=64)


def test_a_heartbeat_of_an_earlier_process_is_ignored() -> None:
    cluster = Cluster(make_worker("d", DECODE, incarnation=2))
    cluster.now += 2.0
    assert cluster.handle(WorkerReported("d", 1, LOAD)) == []
    assert (cluster.worker("d").load, cluster.worker("d").last_heard_s) == (WorkerLoad(blocks_free=64), 100.0)


def test_a_silent_worker_is_removed_once_its_timeout_is_over() -> None:
    cluster = split_cluster()
    cluster.now += TIMEOUT_S
    cluster.handle(WorkerReported("p", 1, LOAD))
    assert cluster.handle(Tick()) == []
    cluster.now += 0.1
    assert cluster.handle(Tick()) == [WorkerRemoved("d", "no heartbeat for 5 s")]
    assert cluster.worker_ids == ["p"]
    assert cluster.handle(Tick()) == []


def test_a_removed_worker_gets_no_requests() -> None:
    cluster = Cluster(make_worker("a"), make_worker("b"))
    cluster.handle(WorkerLeft("a", 1))
    assert [cluster.arrive(f"r{index}") for index in range(3)] == ["b", "b", "b"]


def test_a_worker_that_was_taken_for_dead_is_asked_to_register_and_comes_back() -> None:
    cluster = split_cluster()
    cluster.now += TIMEOUT_S + 1.0
    cluster.handle(Tick())
    assert cluster.handle(WorkerReported("d", 1, LOAD)) == [AskToRegister("d")]
    assert cluster.handle(WorkerRegistered(make_worker("d", DECODE))) == []
    assert cluster.worker_ids == ["d"]


def test_a_worker_leaves() -> None:
    cluster = split_cluster()
    assert cluster.handle(WorkerLeft("d", 1)) == [WorkerRemoved("d", "it has left")]
    assert cluster.worker_ids == ["p"]


@pytest.mark.parametrize(("worker_id", "incarnation"), [("d", 1), ("unknown", 1)])
def test_the_end_of_an_earlier_or_unknown_process_removes_nobody(worker_id: str, incarnation: int) -> None:
    cluster = Cluster(make_worker("p", PREFILL), make_worker("d", DECODE, incarnation=2))
    assert cluster.handle(WorkerLeft(worker_id, incarnation)) == []
    assert cluster.worker_ids == ["d", "p"]


def test_the_snapshot_names_launched_workers_that_are_not_registered() -> None:
    cluster = Cluster(make_worker("p", PREFILL), make_worker("extra"), expected=("p", "d-0", "d-1"))
    assert cluster.controller.snapshot().missing == ("d-0", "d-1")
    cluster.handle(WorkerRegistered(make_worker("d-0", DECODE)))
    cluster.handle(WorkerLeft("p", 1))
    assert cluster.controller.snapshot().missing == ("p", "d-1")


def paced_cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Two heartbeats per second of four workers: one each in two seconds."""
    monkeypatch.setattr(controller, "HEARTBEATS_PER_S", 2)
    return Cluster(*(make_worker(name) for name in "abcd"))


def test_many_workers_are_told_to_report_rarely_and_few_often(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = paced_cluster(monkeypatch)
    assert cluster.handle(WorkerReported("a", 1, LOAD)) == [BeatEvery("a", 2.0)]
    assert cluster.handle(WorkerReported("a", 1, LOAD)) == []
    for name in "bcd":
        cluster.handle(WorkerLeft(name, 1))
    assert cluster.handle(WorkerReported("a", 1, LOAD)) == [BeatEvery("a", 0.5)]


def test_a_worker_that_shall_report_rarely_is_taken_for_dead_after_three_heartbeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = paced_cluster(monkeypatch)
    for name in "ab":
        cluster.handle(WorkerReported(name, 1, LOAD))
    cluster.now += TIMEOUT_S + 0.1  # for c and d, which were not told
    cluster.handle(Tick())
    assert cluster.worker_ids == ["a", "b"]
    cluster.now += 3 * 2.0 - TIMEOUT_S
    assert cluster.handle(Tick()) == [WorkerRemoved(name, "no heartbeat for 6 s") for name in "ab"]
