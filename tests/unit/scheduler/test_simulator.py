"""Virtual time over modelled workers: what comes out is what the cost model says, every time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.admission import AdmissionOptions
from scheduler.cost_model import CostModel
from scheduler.placement import PlacementOptions
from scheduler.policies import POLICIES
from scheduler.sim.simulator import Simulator
from scheduler.sim.workers import SimulatedRequest
from scheduler.types import WorkerInfo, WorkerRole
from scheduler.urgency import ServiceClass, Urgency
from tests.builders import make_worker

PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED


def simulate(policy: str, workers: list[WorkerInfo], requests: list[SimulatedRequest]) -> Simulator:
    simulator = Simulator(workers, PlacementOptions(policy), tokens_per_name=4, max_tokens=50)
    simulator.run(requests)
    return simulator


def load(count: int) -> list[SimulatedRequest]:
    return [
        SimulatedRequest(f"r{number}", 1e-6 * number, 20 + number % 7, 1 + number % 5, (number % 3, 10 + number % 4))
        for number in range(count)
    ]


def times(requests: list[SimulatedRequest]) -> list[tuple[float, float | None]]:
    return [(request.first_token_s, request.finished_s) for request in requests]


def test_a_request_alone_takes_what_the_cost_model_says() -> None:
    workers = [make_worker("p", PREFILL), make_worker("d", DECODE)]
    request = SimulatedRequest("r", 1.0, 40, 3)
    simulate("least_loaded", workers, [request])
    costs = CostModel()
    for info in workers:
        costs.add(info)
    ttft_s = costs.prefill_seconds("p", 40) + costs.transfer_seconds("p", "d", 40)
    steps_s = costs.decode_step_seconds("d", 1, 41) + costs.decode_step_seconds("d", 1, 42)
    assert abs(request.ttft_s - ttft_s) < 1e-9
    assert abs(2 * request.tpot_s - steps_s) < 1e-9


def test_every_request_ends_under_every_policy_and_the_books_are_empty() -> None:
    workers = [make_worker(f"{role.value}{number}", role) for role in WorkerRole for number in range(2)]
    for policy in POLICIES:
        requests = load(60)
        simulator = simulate(policy, workers, requests)
        assert all(request.is_complete and request.finished_s is not None for request in requests), policy
        snapshot = simulator.controller.snapshot()
        assert not any(worker.requests_in_flight or worker.tokens_in_flight for worker in snapshot.workers), policy
        assert all(worker.batcher.is_idle for worker in simulator.workers.values()), policy


def test_the_same_load_gives_the_same_times() -> None:
    def run() -> list[tuple[float, float | None]]:
        requests = load(40)
        simulate("cost", [make_worker("p", PREFILL), make_worker("d", DECODE), make_worker("c")], requests)
        return times(requests)

    assert run() == run()


def test_what_was_computed_before_is_not_computed_again() -> None:
    requests = [SimulatedRequest(f"r{number}", float(number), 21, 2, (1, 2, 3, 4, 5)) for number in range(2)]
    simulate("least_loaded", [make_worker("c")], requests)
    assert [request.num_cached_tokens for request in requests] == [0, 20]
    assert requests[1].ttft_s < requests[0].ttft_s


def test_a_short_prompt_goes_before_a_long_one_that_has_begun() -> None:
    """As ``Batcher`` has it, and as placement predicts; by arrival it would wait for all of the long one."""
    worker = replace(make_worker("c"), max_num_batched_tokens=64, num_blocks=512, max_model_len=2048)
    long, short = SimulatedRequest("long", 0.0, 1000, 2), SimulatedRequest("short", 1e-6, 20, 2)
    simulate("least_loaded", [worker], [long, short])
    costs = CostModel()
    costs.add(worker)
    a_chunk_s, both_s = costs.prefill_seconds("c", 64), costs.prefill_seconds("c", 128, 64)
    assert short.ttft_s == pytest.approx(a_chunk_s + both_s, rel=0.2)
    assert short.ttft_s < long.ttft_s / 4


def test_a_step_with_two_prompts_reads_the_weights_once() -> None:
    worker = make_worker("c")
    one, other = SimulatedRequest("one", 1.0, 20, 1), SimulatedRequest("other", 1.0, 30, 1)
    blocker = SimulatedRequest("blocker", 0.9999999, 2, 1)  # while its step runs both others come
    simulate("least_loaded", [worker], [blocker, one, other])
    costs = CostModel()
    costs.add(worker)
    assert one.first_token_s == other.first_token_s
    together_s = one.first_token_s - blocker.first_token_s
    assert costs.prefill_seconds("c", 50, 20) < together_s + 1e-9 < costs.prefill_seconds("c", 50) + 1e-8
    assert together_s < costs.prefill_seconds("c", 20) + costs.prefill_seconds("c", 30)


def test_what_finds_no_place_waits_for_one_as_at_a_server() -> None:
    """One sequence at a time: admission keeps the others, interactive ones before batch work."""
    worker = replace(make_worker("c"), max_num_seqs=1)
    first, batch, chat = (SimulatedRequest(name, at_s, 8, 4) for name, at_s in (("a", 0.0), ("b", 1e-6), ("c", 2e-6)))
    batch.urgency = Urgency(ServiceClass.BATCH)
    simulate("least_loaded", [worker], [first, batch, chat])
    assert first.finished_s is not None and chat.finished_s is not None
    assert first.finished_s <= chat.first_token_s < chat.finished_s <= batch.first_token_s


def test_what_would_be_late_is_refused_where_the_server_does_so() -> None:
    worker = replace(make_worker("c"), max_num_seqs=1)
    requests = [SimulatedRequest(f"r{number}", 1e-6 * number, 8, 40) for number in range(20)]
    admission = AdmissionOptions(ttft_target_s=0.05, refuses_late=True)
    simulator = Simulator([worker], PlacementOptions(), 4, 50, admission)
    simulator.run(requests)
    refused = [request for request in requests if request.refused_s is not None]
    assert refused and requests[0] not in refused
    assert all(request.ttft_s <= 0.05 for request in requests if request not in refused)
