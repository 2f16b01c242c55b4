"""Placement by cost: against a slow search over all pairs, and on devices of three kinds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cache_index import CacheIndex
from scheduler.cost_model import CostModel
from scheduler.cost_placement import CostPlacement
from scheduler.events import RequestArrived
from scheduler.placement import Choice, Cluster, can_hand_over
from scheduler.types import CacheDelta, DeviceProfile, ModelShape, PrefixHashes, WorkerInfo, WorkerLoad, WorkerRole
from scheduler.urgency import ServiceClass, Urgency
from scheduler.worker_state import WorkerState, Workload
from scheduler.worker_table import WorkerTable
from tests.builders import make_spec, make_worker, repeatable

PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
PROMPTS = 1024  # of a worker that is busy: so short that no other goes before them
NOW = 50.0
NUM_OUTPUT = 100

# A model of 8 B parameters in 16 bits, on devices of three kinds at about what they reach.
SHAPE = ModelShape(32, 14e9, 1e9, 14e9, 1e9, 4.0 * 32 * 4096, 131_072)
COMPUTE = DeviceProfile("compute-heavy", 800_000.0, 1_000.0, 80 << 30, price_per_hour=3.0, link_gb_s=25.0)
BANDWIDTH = DeviceProfile("bandwidth-heavy", 200_000.0, 3_000.0, 80 << 30, price_per_hour=3.0, link_gb_s=25.0)
SMALL = DeviceProfile("small", 100_000.0, 500.0, 48 << 30, price_per_hour=3.0, link_gb_s=25.0)


class Fleet:
    """Workers with their books, under the policy."""

    def __init__(self, *infos: WorkerInfo, ttft_s: float = 2.0, tpot_s: float = 0.1) -> None:
        self.costs = CostModel()
        self.ttft_s, self.tpot_s = ttft_s, tpot_s
        self.policy = CostPlacement(self.costs, ttft_s, tpot_s)
        self.cache = CacheIndex()
        self.table = WorkerTable(self.policy.ranking, self.policy.grouping)
        for info in infos:
            self.costs.add(info)
            self.table.add(WorkerState(info, WorkerLoad(), 0.0))

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.table, self.cache)

    def worker(self, worker_id: str) -> WorkerState:
        worker = self.table.get(worker_id)
        assert worker is not None
        return worker

    def burden(self, worker_id: str, prefill_s: float = 0.0, decodes: int = 0, context: int = 500) -> None:
        worker = self.worker(worker_id)
        for _ in range(PROMPTS if prefill_s else 0):
            worker.begin_prefill(Workload(1, 1, 1, prefill_s / PROMPTS), NOW)
        for _ in range(decodes):
            work = Workload(context, 1, 0, 0.0)
            worker.begin_decode(work, NOW)
            worker.first_token(work, NOW + 1)
        self.table.changed(worker)

    def has_cached(self, worker_id: str, names: tuple[int, ...]) -> None:
        packed = b"".join(name.to_bytes(8, "little") for name in names)
        assert self.cache.apply(worker_id, CacheDelta(0, packed))

    def choose(self, request: RequestArrived) -> Choice:
        return self.policy.choose(request, NUM_OUTPUT, self.cluster, NOW)

    def chosen(self, num_prompt_tokens: int, names: tuple[int, ...] = ()) -> str:
        prefixes = (PrefixHashes(4, 4, names[::-1]),) if names else ()
        choice = self.choose(RequestArrived("r", num_prompt_tokens, 500, prefixes=prefixes))
        prefill = f"{choice.prefill.worker_id} > " if choice.prefill else ""
        return prefill + choice.decode.worker_id


def worker(name: str, role: WorkerRole, device: DeviceProfile) -> WorkerInfo:
    info = make_worker(name, role, spec=make_spec(block_size=4))
    return replace(info, device=device, shape=SHAPE, num_blocks=50_000, max_num_batched_tokens=2048)


# The slow way


@dataclass(frozen=True)
class Outcome:
    """What a placement is predicted to do."""

    ttft_s: float
    finish_s: float  # with the delays of others by the prompt
    cost: float
    keeps_pace: bool


def predicted(fleet: Fleet, request: RequestArrived, choice: Choice) -> Outcome:
    """Straight from the definitions in docs/placement.md."""
    decode, prefill, costs = choice.decode, choice.prefills, fleet.costs
    n, batch, context = request.num_prompt_tokens, decode.batch_size, decode.batch_context_tokens
    in_money = all(each.info.device.price_per_hour for each in fleet.table)
    prices = [each.info.device.price_per_hour if in_money else 1.0 for each in (prefill, decode)]
    cached = fleet.cluster.cached_tokens(prefill, request)
    own_s = costs.prefill_seconds(prefill.worker_id, n, cached)
    ready_s = prefill.backlog_s(NOW, own_s) + own_s
    step_s = costs.decode_step_seconds(decode.worker_id, batch + 1, context + n + NUM_OUTPUT // 2)
    decode_s = step_s * (NUM_OUTPUT - 1)
    excess = max(
        0.0,
        (batch + 1) / decode.info.max_num_seqs - 1,
        (context + n + NUM_OUTPUT // 2) / (decode.info.num_blocks * decode.info.spec.block_size) - 1,
    )
    wait_s = decode_s * excess
    slower_s = 0.0
    if batch:
        slower_s = (step_s - costs.decode_step_seconds(decode.worker_id, batch, context)) * (NUM_OUTPUT - 1)
    transfer_s = 0.0
    if choice.prefill is not None:
        missing = n - fleet.cluster.cached_tokens(decode, request)
        transfer_s = costs.transfer_seconds(prefill.worker_id, decode.worker_id, missing)
    keeps_pace = step_s <= fleet.tpot_s
    if prefill.info.role is not PREFILL:
        chunk = prefill.info.max_num_batched_tokens
        pause_s = own_s if n - cached <= chunk else costs.prefill_seconds(prefill.worker_id, chunk)
        if prefill.batch_size:
            pause_s += costs.decode_step_seconds(prefill.worker_id, prefill.batch_size, prefill.batch_context_tokens)
        keeps_pace = keeps_pace and pause_s <= fleet.tpot_s
    delay_s = ready_s + own_s * prefill.batch_size
    cost = prices[0] * (delay_s + transfer_s) + prices[1] * (wait_s + decode_s + slower_s * batch)
    return Outcome(wait_s + ready_s + transfer_s, wait_s + decode_s + delay_s + transfer_s, cost, keeps_pace)


def judged(fleet: Fleet, outcome: Outcome) -> tuple[int, float]:
    """Smaller is better: both targets and the cost, or the pace and the finish, or the finish."""
    if outcome.keeps_pace and outcome.ttft_s <= fleet.ttft_s:
        return 0, outcome.cost
    return (1 if outcome.keeps_pace else 2), outcome.finish_s


def best_of_all(fleet: Fleet, request: RequestArrived) -> tuple[int, float]:
    decodes = [each for each in fleet.table if each.info.role is not PREFILL]
    prefills = [each for each in fleet.table if each.info.role is not DECODE]
    choices = [Choice(decode) for decode in decodes]
    choices += [
        Choice(decode, prefill)
        for prefill, decode in product(prefills, decodes)
        if decode.info.role is DECODE and can_hand_over(prefill, decode)
    ]
    return min(judged(fleet, predicted(fleet, request, choice)) for choice in choices)


burdens = st.tuples(st.sampled_from([0.0, 0.3, 5.0]), st.integers(0, 70), st.integers(10, 3000))
rates = st.tuples(
    st.sampled_from([5e4, 2e5, 8e5]), st.sampled_from([500.0, 1500.0, 3000.0]), st.sampled_from([0.0, 1.0, 3.0])
)
members = st.tuples(st.sampled_from(list(WorkerRole)), rates, burdens, st.integers(0, 8))


@given(st.lists(members, min_size=1, max_size=8), st.integers(40, 6000), st.sampled_from([0.02, 0.1, 1.0]))
@repeatable(150)
def test_the_quick_search_finds_what_the_slow_one_finds(
    drawn: list[tuple[WorkerRole, tuple[float, float, float], tuple[float, int, int], int]],
    num_prompt_tokens: int,
    tpot_s: float,
) -> None:
    """Every worker of another kind, so that the best of each kind is everybody."""
    infos = [
        replace(
            worker(f"w{index}", role, DeviceProfile("any", gemm, read, 1 << 30, price_per_hour=price)),
            max_num_seqs=64 + index,
        )
        for index, (role, (gemm, read, price), _, _) in enumerate(drawn)
    ]
    infos.append(worker("d", DECODE, BANDWIDTH))
    fleet = Fleet(*infos, tpot_s=tpot_s)
    names = tuple(range(1, 10))
    for index, (role, _, (prefill_s, decodes, context), depth) in enumerate(drawn):
        fleet.burden(f"w{index}", prefill_s, 0 if role is PREFILL else decodes, context)
        fleet.has_cached(f"w{index}", names[:depth])
    request = RequestArrived("r", num_prompt_tokens, 500, prefixes=(PrefixHashes(4, 4, names[::-1]),))
    found = judged(fleet, predicted(fleet, request, fleet.choose(request)))
    assert found == pytest.approx(best_of_all(fleet, request))


# What it decides


def three_kinds(*roles: WorkerRole) -> list[WorkerInfo]:
    devices = (COMPUTE, BANDWIDTH, SMALL)
    return [worker(f"{role.value}-{device.name}", role, device) for role in roles for device in devices]


def test_prefill_goes_to_the_compute_heavy_device_and_decode_to_the_bandwidth_heavy_one() -> None:
    assert Fleet(*three_kinds(PREFILL, DECODE)).chosen(4000) == "prefill-compute-heavy > decode-bandwidth-heavy"


def test_a_full_device_yields_to_the_next_best() -> None:
    fleet = Fleet(*three_kinds(PREFILL, DECODE), tpot_s=0.03)
    fleet.burden("prefill-compute-heavy", prefill_s=30.0)
    fleet.burden("decode-bandwidth-heavy", decodes=64, context=6000)
    assert fleet.chosen(4000) == "prefill-bandwidth-heavy > decode-compute-heavy"


def test_a_cheap_device_is_taken_as_long_as_it_keeps_the_targets() -> None:
    cheap = replace(SMALL, price_per_hour=0.2)
    infos = [worker("dear", PREFILL, COMPUTE), worker("cheap", PREFILL, cheap), worker("d", DECODE, SMALL)]
    assert Fleet(*infos, ttft_s=2.0, tpot_s=0.05).chosen(4000) == "cheap > d"
    assert Fleet(*infos, ttft_s=0.3, tpot_s=0.05).chosen(4000) == "dear > d"


def test_prices_count_only_where_all_are_known() -> None:
    infos = [worker("p", PREFILL, COMPUTE), worker("slow", DECODE, replace(SMALL, price_per_hour=0.01))]
    fast = worker("fast", DECODE, BANDWIDTH)
    assert Fleet(*infos, fast, tpot_s=0.05).chosen(4000) == "p > slow"
    unpriced = replace(fast, device=replace(BANDWIDTH, price_per_hour=0.0))
    assert Fleet(*infos, unpriced, tpot_s=0.05).chosen(4000) == "p > fast"


def test_a_short_prompt_is_computed_where_it_is_decoded_unless_it_holds_up_many() -> None:
    """A handoff takes longer than to compute it, but not than to keep eight others waiting."""
    fleet = Fleet(worker("p", PREFILL, BANDWIDTH), worker("d", DECODE, BANDWIDTH), tpot_s=0.1)
    assert fleet.chosen(5) == "d"
    fleet.burden("d", decodes=8)
    assert fleet.chosen(5) == "p > d"


def test_a_prompt_whose_chunks_would_take_longer_than_a_token_may_is_computed_elsewhere() -> None:
    fleet = Fleet(worker("p", PREFILL, BANDWIDTH), worker("d", DECODE, BANDWIDTH), tpot_s=0.1)
    assert fleet.costs.prefill_seconds("d", 2048) > 0.1
    assert fleet.chosen(4000) == "p > d"


def test_a_cached_prompt_is_computed_where_it_is_decoded() -> None:
    """By what is left to compute and not by its length."""
    fleet = Fleet(worker("p", PREFILL, BANDWIDTH), worker("d", DECODE, BANDWIDTH), tpot_s=0.1)
    names = tuple(range(1, 1001))
    assert fleet.chosen(4004, names) == "p > d"
    fleet.has_cached("d", names)
    assert fleet.chosen(4004, names) == "d"


def test_a_prompt_that_waits_too_long_elsewhere_is_computed_in_place() -> None:
    fleet = Fleet(worker("p", PREFILL, COMPUTE), worker("d", DECODE, COMPUTE), ttft_s=1.0, tpot_s=0.1)
    fleet.burden("d", decodes=8)
    assert fleet.chosen(3000) == "p > d"
    fleet.burden("p", prefill_s=20.0)
    assert fleet.chosen(3000) == "d"


def test_a_long_prompt_that_is_computed_elsewhere_is_no_reason_to_stay_away() -> None:
    """A shorter one goes before it, and a longer one behind."""
    fleet = Fleet(worker("p", PREFILL, COMPUTE), worker("d", DECODE, COMPUTE), ttft_s=1.0, tpot_s=0.1)
    fleet.burden("d", decodes=8)
    long_s = 4 * fleet.costs.prefill_seconds("p", 3000)
    fleet.worker("p").begin_prefill(Workload(1, 1, 1, long_s), NOW)
    assert fleet.worker("p").backlog_s(NOW, long_s) == pytest.approx(long_s)
    assert fleet.worker("p").backlog_s(NOW, long_s / 4) == 0.0
    assert fleet.chosen(3000) == "p > d"


def test_a_prompt_waits_for_the_running_step_of_a_longer_one_and_for_all_of_a_shorter_one() -> None:
    state = Fleet(worker("p", PREFILL, COMPUTE)).worker("p")
    state.rest_of_step_s = 0.125
    assert state.backlog_s(NOW, 0.5) == 0.0
    state.begin_prefill(Workload(1, 1, 1, 0.0625), NOW)
    assert state.backlog_s(NOW, 0.5) == 0.0625
    state.begin_prefill(Workload(1, 1, 1, 8.0), NOW)
    assert state.backlog_s(NOW, 0.5) == 0.0625 + 0.125
    assert state.backlog_s(NOW, 8.0) == 8.0625


def test_batch_work_that_fills_a_decode_worker_sends_no_interactive_request_elsewhere() -> None:
    """The worker preempts it for them. A batch request would wait, so it goes elsewhere."""
    infos = [replace(worker(name, DECODE, device), max_num_seqs=4) for name, device in (("d", BANDWIDTH), ("s", SMALL))]
    fleet = Fleet(worker("p", PREFILL, COMPUTE), *infos)
    assert fleet.chosen(500) == "p > d"
    for _ in range(16):
        fleet.worker("d").begin_decode(Workload(500, 1, 0, 0.0, is_batch=True), NOW)
    fleet.table.changed(fleet.worker("d"))
    assert fleet.chosen(500) == "p > d"
    job = fleet.choose(RequestArrived("r", 500, 500, urgency=Urgency(ServiceClass.BATCH)))
    assert job.decode.worker_id == "s"


def test_where_no_target_can_be_kept_nobody_is_held_up_and_the_earliest_finish_wins() -> None:
    infos = [worker("slow", PREFILL, SMALL), worker("fast", PREFILL, COMPUTE), worker("d", DECODE, BANDWIDTH)]
    assert Fleet(*infos, ttft_s=0.001, tpot_s=0.05).chosen(8000) == "fast > d"


def test_what_a_worker_has_cached_is_worth_the_time_it_saves() -> None:
    infos = [worker(name, PREFILL, COMPUTE) for name in ("a", "b")]
    fleet = Fleet(*infos, worker("d", DECODE, SMALL), tpot_s=0.05)
    names = tuple(range(1, 1001))
    fleet.has_cached("b", names)
    saved_s = fleet.costs.prefill_seconds("a", 4001) - fleet.costs.prefill_seconds("b", 4001, 4000)
    fleet.burden("b", prefill_s=0.9 * saved_s)
    assert fleet.chosen(4001, names) == "b > d"
    fleet.burden("b", prefill_s=0.2 * saved_s)
    assert fleet.chosen(4001, names) == "a > d"
