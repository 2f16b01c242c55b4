"""Drains and changes of role: nothing new arrives, nothing that runs is lost, and everybody learns of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.cache_index import pack_names, unpack_names
from scheduler.controller import ClusterController
from scheduler.demand import candidates
from scheduler.events import (
    ActivateWorker,
    AskToRegister,
    ChangeRole,
    Command,
    DrainWorker,
    Event,
    PlaceRequest,
    PrefillDone,
    RefuseDuty,
    RefuseRequest,
    RequestArrived,
    RequestEnded,
    TakeDuty,
    Tick,
    WorkerRegistered,
    WorkerReported,
    WorkersExpected,
)
from scheduler.placement import PlacementOptions
from scheduler.types import CacheDelta, Duty, DutyState, Phase, PrefixHashes, WorkerLoad, WorkerRole, WorkerSnapshot
from tests.builders import make_worker

PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
SPLIT = PlacementOptions("least_loaded")  # never prefills in place on a decode worker
IDLE = WorkerLoad(blocks_free=64)
BUSY = {
    "running": WorkerLoad(running=1),
    "waiting": WorkerLoad(waiting=1),
    "KV that waits to be taken": WorkerLoad(blocks_leased=2),
}


class Cluster:
    """A controller, its clock, and what it told each worker last."""

    def __init__(self, options: PlacementOptions | None = None, **roles: WorkerRole) -> None:
        self.controller = ClusterController(options=options or SPLIT)
        self.now = 100.0
        for name, role in roles.items():
            self.handle(WorkerRegistered(make_worker(name, role)))

    def handle(self, event: Event) -> list[Command]:
        return self.controller.handle(event, self.now)

    def place(self, request_id: str, num_prompt_tokens: int = 40, max_tokens: int = 5) -> list[str]:
        """The workers that a request was placed on; empty when it was refused."""
        (command,) = self.handle(RequestArrived(request_id, num_prompt_tokens, max_tokens))
        if isinstance(command, RefuseRequest):
            return []
        assert isinstance(command, PlaceRequest)
        placement = command.placement
        return [each.worker_id for each in (placement.prefill, placement.decode) if each is not None]

    def report(self, worker_id: str, load: WorkerLoad = IDLE) -> list[Command]:
        return self.handle(WorkerReported(worker_id, 1, load))

    def worker(self, worker_id: str) -> WorkerSnapshot:
        (found,) = [each for each in self.controller.snapshot().workers if each.info.worker_id == worker_id]
        return found

    def state(self, worker_id: str) -> DutyState:
        return self.worker(worker_id).duty.state


def four() -> Cluster:
    return Cluster(p0=PREFILL, p1=PREFILL, d0=DECODE, d1=DECODE)


def used_by(cluster: Cluster, num_requests: int = 20) -> set[str]:
    names: set[str] = set()
    for index in range(num_requests):
        names |= set(cluster.place(f"more-{index}"))
        cluster.handle(RequestEnded(f"more-{index}"))
    return names


@pytest.mark.parametrize("worker_id", ["p0", "d0"])
def test_a_draining_worker_gets_nothing_new(worker_id: str) -> None:
    cluster = four()
    assert worker_id in used_by(cluster)
    assert cluster.handle(DrainWorker(worker_id)) == []
    assert worker_id not in used_by(cluster)


@pytest.mark.parametrize("why", BUSY)
def test_a_worker_is_drained_only_when_its_own_count_says_so_too(why: str) -> None:
    """What a restarted scheduler has forgotten, and KV on its way, only the worker knows."""
    cluster = four()
    cluster.handle(DrainWorker("p0"))
    cluster.report("p0", BUSY[why])
    assert cluster.state("p0") is DutyState.DRAINING
    cluster.report("p0")
    assert cluster.state("p0") is DutyState.DRAINED


def test_a_prefill_worker_waits_for_the_first_tokens_of_all_that_was_placed_on_it() -> None:
    cluster = Cluster(p0=PREFILL, d0=DECODE)
    cluster.place("r")
    cluster.handle(DrainWorker("p0", force=True))
    cluster.report("p0")
    assert cluster.state("p0") is DutyState.DRAINING, "the request had not reached it when it reported"
    cluster.handle(PrefillDone("r"))
    cluster.report("p0")
    assert cluster.state("p0") is DutyState.DRAINED


def test_a_decode_worker_waits_for_the_last_token() -> None:
    cluster = Cluster(p0=PREFILL, d0=DECODE)
    cluster.place("r")
    cluster.handle(DrainWorker("d0", force=True))
    cluster.handle(PrefillDone("r"))
    cluster.report("d0")
    assert cluster.state("d0") is DutyState.DRAINING
    cluster.handle(RequestEnded("r"))
    cluster.report("d0")
    assert cluster.state("d0") is DutyState.DRAINED


def test_a_worker_changes_its_role_once_it_is_empty_and_is_used_in_it() -> None:
    cluster = four()
    assert cluster.handle(ChangeRole("p0", DECODE)) == []
    assert cluster.worker("p0").duty == Duty(DutyState.DRAINING, DECODE)
    assert "p0" not in used_by(cluster)
    (told,) = cluster.report("p0")
    assert told == TakeDuty("p0", DECODE, Duty())
    assert (cluster.worker("p0").info.role, cluster.worker("p0").info.incarnation) == (DECODE, 1)
    prefills = {cluster.place(f"r{index}")[0] for index in range(12)}
    assert prefills <= {"p1", "d0", "d1", "p0"}
    decodes = {cluster.place(f"s{index}")[-1] for index in range(12)}
    assert "p0" in decodes


def test_a_duty_is_told_with_every_heartbeat_so_that_a_lost_answer_does_no_harm() -> None:
    cluster = four()
    assert cluster.report("p0") == []
    cluster.handle(DrainWorker("p0"))
    assert cluster.report("p0", BUSY["running"]) == [TakeDuty("p0", PREFILL, Duty(DutyState.DRAINING))]
    assert cluster.report("p0", BUSY["running"]) == [TakeDuty("p0", PREFILL, Duty(DutyState.DRAINING))]
    cluster.handle(ActivateWorker("p0"))
    assert cluster.report("p0") == [TakeDuty("p0", PREFILL, Duty())]


def test_a_scheduler_that_was_restarted_learns_duties_back_from_the_workers() -> None:
    before = four()
    before.handle(DrainWorker("d0"))
    before.handle(ChangeRole("p0", DECODE))
    before.report("p0")
    after = Cluster()
    assert after.report("d0") == [AskToRegister("d0")]
    for worker in before.controller.snapshot().workers:
        after.handle(WorkerRegistered(worker.info, worker.duty))
    assert after.state("d0") is DutyState.DRAINING
    assert after.worker("p0").info.role is DECODE
    assert "d0" not in used_by(after)


def test_a_gateway_that_places_by_itself_passes_over_draining_workers() -> None:
    cluster = four()
    cluster.handle(DrainWorker("d0"))
    alone = Cluster()
    alone.controller = ClusterController.from_snapshot(cluster.controller.snapshot(), (), SPLIT, 0.0)
    assert used_by(alone) == {"p0", "p1", "d1"}


@pytest.mark.parametrize(("of_server", "of_order", "expected"), [(None, 5.0, 5.0), (9.0, None, 9.0), (9.0, 0.0, 0.0)])
def test_a_drain_has_the_limit_of_its_order_or_else_of_the_server(
    of_server: float | None, of_order: float | None, expected: float
) -> None:
    cluster = Cluster(replace(SPLIT, move_after_s=of_server), p0=PREFILL, p1=PREFILL, d0=DECODE, d1=DECODE)
    cluster.handle(DrainWorker("d0", move_after_s=of_order))
    assert cluster.worker("d0").duty == Duty(DutyState.DRAINING, None, expected)
    cluster.handle(ChangeRole("p0", DECODE, of_order))
    assert cluster.worker("p0").duty == Duty(DutyState.DRAINING, DECODE, expected)


def test_a_drain_that_has_begun_can_be_given_another_limit() -> None:
    cluster = four()
    cluster.handle(DrainWorker("d0"))
    assert cluster.report("d0", BUSY["running"]) == [TakeDuty("d0", DECODE, Duty(DutyState.DRAINING))]
    cluster.handle(DrainWorker("d0", move_after_s=0.0))
    assert cluster.report("d0", BUSY["running"]) == [TakeDuty("d0", DECODE, Duty(DutyState.DRAINING, None, 0.0))]


def test_nothing_is_moved_from_the_last_worker_of_a_phase() -> None:
    cluster = Cluster(replace(SPLIT, move_after_s=5.0), p0=PREFILL, d0=DECODE, d1=DECODE)
    for worker_id, expected in {"d0": 5.0, "d1": None, "p0": None}.items():
        cluster.handle(DrainWorker(worker_id, force=True))
        assert cluster.worker(worker_id).duty.move_after_s == expected


def test_an_activated_worker_is_used_again() -> None:
    cluster = four()
    cluster.handle(DrainWorker("d0"))
    cluster.report("d0")
    cluster.handle(ActivateWorker("d0"))
    assert "d0" in used_by(cluster)


def test_a_restarted_process_begins_active() -> None:
    cluster = four()
    cluster.handle(DrainWorker("d0"))
    cluster.handle(WorkerRegistered(make_worker("d0", DECODE, incarnation=2)))
    assert cluster.state("d0") is DutyState.ACTIVE
    assert cluster.handle(WorkerReported("d0", 2, IDLE)) == []


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (DrainWorker("p0"), "p0 is the only active worker for prefill"),
        (DrainWorker("d0"), "d0 is the only active worker for decode"),
        (ChangeRole("p0", DECODE), "p0 is the only active worker for prefill"),
        (DrainWorker("x"), "there is no worker x"),
        (ActivateWorker("x"), "there is no worker x"),
        (ChangeRole("x", DECODE), "there is no worker x"),
    ],
)
def test_what_would_leave_a_phase_without_a_worker_is_refused(event: Event, words: str) -> None:
    cluster = Cluster(p0=PREFILL, d0=DECODE)
    (command,) = cluster.handle(event)
    assert isinstance(command, RefuseDuty)
    assert command.message == words
    assert used_by(cluster) == {"p0", "d0"}


def test_a_colocated_worker_has_no_other_role() -> None:
    cluster = Cluster(c0=COLOCATED, c1=COLOCATED)
    (command,) = cluster.handle(ChangeRole("c0", DECODE))
    assert isinstance(command, RefuseDuty)


def test_a_forced_drain_may_leave_a_phase_alone() -> None:
    cluster = Cluster(p0=PREFILL, d0=DECODE)
    assert cluster.handle(DrainWorker("d0", force=True)) == []
    assert cluster.place("r") == []


def test_who_is_expected_can_change() -> None:
    cluster = Cluster(p0=PREFILL)
    cluster.handle(WorkersExpected(("p0", "d7")))
    assert cluster.controller.snapshot().missing == ("d7",)


def slow_cluster() -> Cluster:
    """Devices on which a few requests a second are a heavy load, so that virtual minutes are few events."""
    cluster = Cluster(replace(SPLIT, roles_follow_load=True))
    for name, role in {"p0": PREFILL, "p1": PREFILL, "d0": DECODE, "d1": DECODE}.items():
        cluster.handle(WorkerRegistered(make_worker(name, role, gemm_gflop_s=1.0, read_gb_s=0.1)))
    return cluster


def run_load(cluster: Cluster, seconds: float, num_prompt_tokens: int, num_output_tokens: int, phase: Phase) -> None:
    """Requests that keep 2.3 workers busy in one phase; each takes a second. No request may be refused."""
    sizes = (num_prompt_tokens, num_prompt_tokens + num_output_tokens // 2)
    rates = candidates(cluster.controller._workers, cluster.controller._costs, sizes, SPLIT.tpot_target_s)[0]
    of_phase = {
        Phase.PREFILL: rates.prefill_tokens_s / num_prompt_tokens,
        Phase.DECODE: rates.decode_tokens_s / num_output_tokens,
    }
    due, placed, until = 0.0, [], cluster.now + seconds
    while cluster.now < until:
        cluster.now += 0.5
        due += 0.5 * 2.3 * of_phase[phase]
        ending, placed = placed, []
        while due >= 1:
            due -= 1
            request_id = f"{cluster.now}-{due}"
            assert cluster.place(request_id, num_prompt_tokens, num_output_tokens), "a request was refused"
            placed.append(request_id)
        for request_id in ending:
            cluster.handle(PrefillDone(request_id))
            cluster.handle(RequestEnded(request_id, num_output_tokens))
        for worker in cluster.controller.snapshot().workers:
            cluster.report(worker.info.worker_id)
        cluster.handle(Tick())
    for request_id in placed:
        cluster.handle(RequestEnded(request_id, num_output_tokens))


def test_roles_follow_a_load_that_turns_without_refusing_a_request() -> None:
    """Two prefill and two decode workers; long prompts with short answers, then the reverse, in virtual time."""
    cluster = slow_cluster()

    def num_prefill() -> int:
        return sum(worker.info.role is PREFILL for worker in cluster.controller.snapshot().workers)

    run_load(cluster, 200, 200, 2, Phase.PREFILL)
    assert num_prefill() == 3
    run_load(cluster, 400, 10, 60, Phase.DECODE)
    assert num_prefill() == 1


def test_what_a_draining_worker_has_cached_attracts_nobody() -> None:
    packed = pack_names([bytes([index]) * 8 for index in range(1, 11)])
    request = RequestArrived("r", 41, 5, prefixes=(PrefixHashes(4, 4, unpack_names(packed)[::-1]),))
    cluster = Cluster(PlacementOptions("cost"), d0=DECODE, d1=DECODE, p0=PREFILL, p1=PREFILL)
    for worker_id in ("d1", "p1"):
        cluster.handle(WorkerReported(worker_id, 1, IDLE, cache=CacheDelta(0, packed)))
    assert placed_on(cluster, request) == "d1"
    cluster.handle(DrainWorker("d1"))
    cluster.handle(DrainWorker("p1"))
    assert placed_on(cluster, request) == "d0"


def placed_on(cluster: Cluster, request: RequestArrived) -> str:
    """The decode worker; no prefill worker that drains may be beside it."""
    (command,) = cluster.handle(request)
    assert isinstance(command, PlaceRequest)
    prefill = command.placement.prefill
    assert prefill is None or cluster.state(prefill.worker_id) is DutyState.ACTIVE
    cluster.handle(RequestEnded(request.request_id))
    return command.placement.decode.worker_id
