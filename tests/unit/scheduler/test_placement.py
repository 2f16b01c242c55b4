"""Which worker gets which phase, as a function of the snapshots alone."""

from __future__ import annotations

import pytest

from kvcache.errors import UnavailableError
from scheduler.placement import place_least_loaded
from scheduler.types import Phase, Placement, WorkerAddress, WorkerInfo, WorkerLoad, WorkerRole, WorkerSnapshot
from tests.builders import make_worker

PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED


def snapshot(info: WorkerInfo, tokens: int = 0, requests: int = 0, placed: int = 0) -> WorkerSnapshot:
    return WorkerSnapshot(info, WorkerLoad(), requests, tokens, placed, last_heard_s=0.0)


def chosen(placement: Placement) -> tuple[str | None, str]:
    return placement.prefill and placement.prefill.worker_id, placement.decode.worker_id


@pytest.mark.parametrize(
    ("role", "phases"),
    [(PREFILL, {Phase.PREFILL}), (DECODE, {Phase.DECODE}), (COLOCATED, {Phase.PREFILL, Phase.DECODE})],
)
def test_a_role_says_which_phases_a_worker_takes(role: WorkerRole, phases: set[Phase]) -> None:
    assert {phase for phase in Phase if role.takes(phase)} == phases


def test_a_sequence_stays_where_part_of_its_kv_is_as_long_as_that_worker_lives() -> None:
    prefill, idle = snapshot(make_worker("p", PREFILL)), snapshot(make_worker("a", DECODE))
    busy = snapshot(make_worker("b", DECODE), tokens=100)
    assert chosen(place_least_loaded("r", [prefill, idle, busy], stay_on="b")) == ("p", "b")
    assert chosen(place_least_loaded("r", [prefill, idle], stay_on="b")) == ("p", "a")


def test_each_phase_goes_to_a_worker_of_its_role() -> None:
    workers = [snapshot(make_worker("p", PREFILL)), snapshot(make_worker("d", DECODE))]
    assert place_least_loaded("r", workers) == Placement(
        "r", decode=WorkerAddress("d", "d.test:1"), prefill=WorkerAddress("p", "p.test:1")
    )


def test_a_worker_of_both_roles_prefills_in_place() -> None:
    assert chosen(place_least_loaded("r", [snapshot(make_worker("c"))])) == (None, "c")


def test_a_decode_worker_may_get_its_prompt_from_a_worker_of_both_roles() -> None:
    busy, idle = snapshot(make_worker("c"), tokens=100), snapshot(make_worker("d", DECODE))
    assert chosen(place_least_loaded("r", [busy, idle])) == ("c", "d")


def test_decode_goes_where_present_work_would_be_read_soonest() -> None:
    slow = snapshot(make_worker("slow", read_gb_s=10.0), tokens=100)  # 10 tokens per GB/s
    fast = snapshot(make_worker("fast", read_gb_s=40.0), tokens=300)  # 7.5
    assert chosen(place_least_loaded("r", [slow, fast])) == (None, "fast")


def test_prefill_goes_where_present_work_would_be_computed_soonest() -> None:
    """The memory rate says the opposite and is not asked."""
    slow = snapshot(make_worker("slow", PREFILL, gemm_gflop_s=100.0, read_gb_s=90.0), tokens=1000)
    fast = snapshot(make_worker("fast", PREFILL, gemm_gflop_s=400.0, read_gb_s=1.0), tokens=3000)
    decode = snapshot(make_worker("d", DECODE))
    assert chosen(place_least_loaded("r", [slow, fast, decode])) == ("fast", "d")


def test_at_equal_work_the_worker_with_fewer_requests_is_chosen() -> None:
    many, few = snapshot(make_worker("a"), tokens=100, requests=5), snapshot(make_worker("b"), tokens=100, requests=2)
    assert chosen(place_least_loaded("r", [many, few])) == (None, "b")


def test_idle_workers_take_turns_by_what_they_got_so_far() -> None:
    workers = [snapshot(make_worker("a"), placed=4), snapshot(make_worker("b"), placed=3)]
    assert chosen(place_least_loaded("r", workers)) == (None, "b")


def test_the_order_of_the_snapshots_does_not_matter() -> None:
    workers = [snapshot(make_worker(name)) for name in "cab"]
    assert chosen(place_least_loaded("r", workers)) == chosen(place_least_loaded("r", workers[::-1])) == (None, "a")


def test_an_avoided_worker_is_not_chosen() -> None:
    idle, busy = snapshot(make_worker("a")), snapshot(make_worker("b"), tokens=500)
    assert chosen(place_least_loaded("r", [idle, busy], avoid=("a",))) == (None, "b")


@pytest.mark.parametrize(
    ("workers", "phase"),
    [
        ([], "decode"),
        ([make_worker("p", PREFILL)], "decode"),
        ([make_worker("d", DECODE)], "prefill"),
    ],
)
def test_a_phase_without_a_worker_is_named(workers: list[WorkerInfo], phase: str) -> None:
    with pytest.raises(UnavailableError, match=f"No {phase} worker"):
        place_least_loaded("r", map(snapshot, workers))


def test_an_avoided_worker_is_chosen_where_there_is_no_other() -> None:
    workers = [snapshot(make_worker("p", PREFILL)), snapshot(make_worker("d", DECODE))]
    assert chosen(place_least_loaded("r", workers, avoid=("p", "d"))) == ("p", "d")
