"""How much work arrives, how fast workers could do it, and how busy that makes a pool."""

from __future__ import annotations

from collections import Counter

import pytest

from scheduler import demand
from scheduler.autoscaler import HOLD_UP_S, MOST_REFUSED
from scheduler.cost_model import CostModel
from scheduler.demand import MEMORY_S, MOST_ASKED, DemandMeter, candidates, decode_rate, pool_loads
from scheduler.types import Duty, DutyState, PoolLoad, WorkerLoad, WorkerRole
from scheduler.worker_state import WorkerState
from scheduler.worker_table import WorkerTable
from tests.builders import make_worker

PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
TPOT_TARGET_S = 0.1


def state(name: str, role: WorkerRole, costs: CostModel, duty: Duty | None = None, **rates: float) -> WorkerState:
    info = make_worker(name, role, **rates)
    costs.add(info)
    return WorkerState(info, WorkerLoad(blocks_free=info.num_blocks), 0.0, duty or Duty())


def table(*workers: WorkerState) -> WorkerTable:
    made = WorkerTable()
    for worker in workers:
        made.add(worker)
    return made


def loads(
    workers: WorkerTable, costs: CostModel, meter: DemandMeter, now: float, num_queued: int = 0
) -> tuple[PoolLoad, ...]:
    able = candidates(workers, costs, meter.sizes(), TPOT_TARGET_S)
    return pool_loads(workers, able, costs, meter, num_queued, now)


def metered(seconds: float, every_s: float = 0.5) -> tuple[DemandMeter, float]:
    """Two requests a second of 100 prompt tokens, 20 of them cached, and 30 output tokens."""
    meter, now = DemandMeter(), 1000.0
    until = now + seconds
    while now < until:
        now += every_s
        meter.add(100, 20, 30, now)
    return meter, now


def test_a_steady_load_is_measured_as_what_it_is() -> None:
    meter, now = metered(6 * MEMORY_S)
    measured = meter.demand(now)
    assert measured.prefill_tokens_s == pytest.approx(160, rel=0.03)
    assert measured.decode_tokens_s == pytest.approx(60, rel=0.03)
    assert meter.sizes() == (100, 115)


def test_a_load_that_has_ended_is_forgotten() -> None:
    meter, now = metered(6 * MEMORY_S)
    assert meter.demand(now + 5 * MEMORY_S).prefill_tokens_s < 2


def test_nothing_yet_is_no_load() -> None:
    meter = DemandMeter()
    assert (meter.demand(5.0).prefill_tokens_s, meter.sizes()) == (0.0, (1, 1))


def test_requests_that_wait_count_as_if_they_came_just_now() -> None:
    meter, now = metered(6 * MEMORY_S)
    waiting = meter.demand(now, num_queued=60)
    assert waiting.prefill_tokens_s == pytest.approx(2 * meter.demand(now).prefill_tokens_s, rel=0.03)
    assert waiting.decode_tokens_s == pytest.approx(2 * meter.demand(now).decode_tokens_s, rel=0.03)


def test_a_wait_is_as_long_as_so_many_took_to_be_placed_of_late() -> None:
    meter, now = metered(6 * MEMORY_S)
    assert meter.wait_s(10, now) == pytest.approx(5.0, rel=0.03)
    assert meter.wait_s(0, now) == 0.0
    assert DemandMeter().wait_s(1, 0.0) > 1000.0, "nothing was placed"


def test_requests_that_are_refused_all_the_time_are_counted_with_what_they_ask_for() -> None:
    """Two are placed in a second and four refused, of twice the prompt; a fifth of the prompts is cached."""
    meter, now = metered(6 * MEMORY_S)
    for _ in range(100):
        now += 0.25
        meter.refuse(200, 30, now)
        if now % 0.5 == 0.0:
            meter.add(100, 20, 30, now)
    refused = meter.refused_demand(now)
    assert refused.prefill_tokens_s == pytest.approx(4 * 200 * 0.8, rel=0.05)
    assert refused.decode_tokens_s == pytest.approx(4 * 30, rel=0.05)
    assert meter.refused_part(now) == pytest.approx(2 / 3, rel=0.05)


def test_requests_that_are_refused_count_where_none_was_ever_placed() -> None:
    meter = DemandMeter()
    meter.refuse(100, 30, 7.0)
    assert meter.refused_demand(7.0).prefill_tokens_s > 0.0
    assert meter.refused_part(7.0) > MOST_REFUSED
    assert meter.refused_part(7.0 + HOLD_UP_S) < MOST_REFUSED, "one alone would make pools grow for ever"


def test_a_burst_of_refused_requests_is_forgotten_before_a_pool_would_grow_for_it() -> None:
    meter, now = metered(6 * MEMORY_S)
    for _ in range(8):
        meter.refuse(100, 30, now)
    assert meter.refused_part(now) > MOST_REFUSED
    end_s = now + HOLD_UP_S - 1.0
    while now < end_s:
        now += 0.5
        meter.add(100, 20, 30, now)
    assert meter.refused_part(now) < MOST_REFUSED


def test_a_decode_rate_is_that_of_the_largest_batch_that_keeps_the_target() -> None:
    costs = CostModel()
    worker = state("d", DECODE, costs, read_gb_s=0.01)
    rates = {size: size / costs.decode_step_seconds("d", size, size * 4) for size in (1, 2, 4, 8, 16, 32, 64)}
    target_s = 8 / rates[8]
    kept = [rate for size, rate in rates.items() if size / rate <= target_s]
    assert len(kept) == 4, "the target must cut somewhere"
    assert decode_rate(worker, costs, 4, target_s) == max(kept)


def test_a_target_that_no_batch_keeps_leaves_one_sequence_at_a_time() -> None:
    costs = CostModel()
    worker = state("d", DECODE, costs)
    assert decode_rate(worker, costs, 4, 1e-9) == 1 / costs.decode_step_seconds("d", 1, 4)


def test_only_active_workers_of_the_two_pools_can_change_roles() -> None:
    costs = CostModel()
    workers = table(
        state("p", PREFILL, costs),
        state("d", DECODE, costs),
        state("c", COLOCATED, costs),
        state("gone", DECODE, costs, Duty(DutyState.DRAINED)),
    )
    assert [each.worker_id for each in candidates(workers, costs, (10, 20), TPOT_TARGET_S)] == ["p", "d"]


def test_a_pool_is_as_busy_as_its_work_over_what_its_active_workers_can_do() -> None:
    costs = CostModel()
    workers = table(*(state(name, PREFILL, costs) for name in ("p0", "p1")), state("d", DECODE, costs))
    meter, now = metered(6 * MEMORY_S)
    prefill, decode = loads(workers, costs, meter, now)
    rates = {each.worker_id: each for each in candidates(workers, costs, meter.sizes(), TPOT_TARGET_S)}
    demand = meter.demand(now)
    assert (prefill.role, prefill.num_workers, decode.role, decode.num_workers) == (PREFILL, 2, DECODE, 1)
    assert prefill.busyness == pytest.approx(demand.prefill_tokens_s / (2 * rates["p0"].prefill_tokens_s))
    assert decode.busyness == pytest.approx(demand.decode_tokens_s / rates["d"].decode_tokens_s)
    assert prefill.latency_s == pytest.approx(costs.prefill_seconds("p0", 100))
    assert decode.latency_s == pytest.approx(costs.decode_step_seconds("d", 1, 115))


def test_a_pool_without_an_active_worker_has_no_load() -> None:
    costs = CostModel()
    workers = table(state("p", PREFILL, costs), state("d", DECODE, costs, Duty(DutyState.DRAINING)))
    assert [load.role for load in loads(workers, costs, DemandMeter(), 1.0)] == [PREFILL]


def test_of_a_large_pool_a_part_tells_how_busy_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = CostModel()
    workers = table(*(state(f"p{number}", PREFILL, costs) for number in range(10)), state("d", DECODE, costs))
    meter, now = metered(6 * MEMORY_S)
    whole = loads(workers, costs, meter, now)
    monkeypatch.setattr(demand, "MOST_ASKED", 3)
    asked: list[str] = []
    monkeypatch.setattr(demand, "_latency", lambda worker, *_: asked.append(worker.worker_id) or 0.0)
    parts = loads(workers, costs, meter, now)
    assert len(asked) == 4 and asked[-1] == "d"
    assert [each.num_workers for each in parts] == [10, 1]
    able = candidates(workers, costs, meter.sizes(), TPOT_TARGET_S)
    assert [each.worker_id for each in able] == asked, "roles are planned by others than tell how busy pools are"
    assert [each.busyness for each in parts] == pytest.approx([each.busyness for each in whole])


@pytest.mark.parametrize("num_kinds", [2, 3, 4])
def test_of_kinds_of_workers_that_come_in_turn_each_is_asked_as_often_as_there_are_of_it(num_kinds: int) -> None:
    """Every second one, or every fourth, would all be of one kind."""
    costs = CostModel()
    speeds = [100.0 * 2**kind for kind in range(num_kinds)]
    pool = [
        state(f"p{number:03}", PREFILL, costs, gemm_gflop_s=speeds[number % num_kinds])
        for number in range(MOST_ASKED * num_kinds)
    ]
    workers = table(*pool)
    able = candidates(workers, costs, (100, 115), TPOT_TARGET_S)
    assert len(able) == MOST_ASKED
    of_all = sum(100 / costs.prefill_seconds(each.worker_id, 100) for each in pool)
    assert sum(each.prefill_tokens_s for each in able) == pytest.approx(of_all, rel=0.15)
    kinds = Counter(int(each.worker_id[1:]) % num_kinds for each in able)
    assert len(kinds) == num_kinds and min(kinds.values()) > MOST_ASKED / num_kinds / 2


def test_the_same_workers_are_asked_in_whatever_order_they_came_and_all_but_one_when_one_goes() -> None:
    costs = CostModel()
    pool = [state(f"p{number}", PREFILL, costs) for number in range(3 * MOST_ASKED)]
    workers, turned = table(*pool), table(*reversed(pool))

    def asked(of: WorkerTable) -> set[str]:
        return {each.worker_id for each in candidates(of, costs, (100, 115), TPOT_TARGET_S)}

    before = asked(workers)
    assert before == asked(turned)
    gone = next(each for each in pool if each.worker_id in before)
    workers.remove(gone)
    assert len(before - asked(workers)) == 1


SCARCE = {
    "decode workers are busier": (0.3, 0.9, 1.0, {DECODE}),
    "prefill workers are busier": (0.9, 0.3, 1.0, {PREFILL}),
    "both are as busy": (0.95, 0.9, 1.0, {PREFILL, DECODE}),
    "places are held for prompts that do not wait": (0.4, 0.2, 0.5, {DECODE}),
    "prompts wait in a line, whatever was placed of late": (0.4, 0.5, 3.0, {PREFILL}),
    "nothing was placed": (0.0, 0.0, 0.0, {DECODE}),
}


@pytest.mark.parametrize("case", SCARCE)
def test_those_that_wait_are_told_to_wait_for_the_bottleneck(case: str) -> None:
    prefill, decode, num_ahead, expected = SCARCE[case]
    assert demand._scarce({PREFILL: prefill, DECODE: decode}, num_ahead) == expected


def test_what_waits_before_the_workers_or_on_decode_workers_makes_a_wait() -> None:
    costs = CostModel()
    workers = table(state("p", PREFILL, costs), state("d", DECODE, costs))
    meter, now = metered(6 * MEMORY_S)
    assert [load.wait_s for load in loads(workers, costs, meter, now)] == [0.0, 0.0]
    for worker in workers:
        worker.hear(WorkerLoad(waiting=4), now)
    assert [load.wait_s for load in loads(workers, costs, meter, now)] == pytest.approx([0.0, 2.0], rel=0.03)
    waits = [load.wait_s for load in loads(workers, costs, meter, now, num_queued=60)]
    assert waits == pytest.approx([0.0, 32.0], rel=0.03), "decode workers are what these would wait for"


def test_those_refused_are_refused_for_want_of_the_bottleneck_and_are_work_for_either_pool() -> None:
    costs = CostModel()
    workers = table(state("p", PREFILL, costs), state("d", DECODE, costs))
    meter, now = metered(6 * MEMORY_S)
    before = loads(workers, costs, meter, now)
    assert [load.refused for load in before] == [0.0, 0.0]
    for _ in range(10):
        meter.refuse(100, 30, now)
    after = loads(workers, costs, meter, now)
    assert [load.refused for load in after] == pytest.approx([0.0, 0.5], rel=0.03)
    assert [load.busyness for load in after] == pytest.approx([2 * load.busyness for load in before], rel=0.03)
