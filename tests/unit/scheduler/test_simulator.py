"""Virtual time over modelled workers: what comes out is what the cost model says, every time."""

from __future__ import annotations

from scheduler.cost_model import CostModel
from scheduler.placement import PlacementOptions
from scheduler.policies import POLICIES
from scheduler.sim.simulator import Simulator
from scheduler.sim.workers import SimulatedCache, SimulatedRequest
from scheduler.types import CacheDelta, WorkerInfo, WorkerRole
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
        snapshot = simulator._controller.snapshot()
        assert not any(worker.requests_in_flight or worker.tokens_in_flight for worker in snapshot.workers), policy
        assert not any(worker.has_work or worker._tokens_held for worker in simulator.workers.values()), policy


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


def test_a_cache_forgets_what_was_used_least_recently_from_the_end_of_a_prefix() -> None:
    cache = SimulatedCache(4)
    cache.use([1, 2, 3])
    cache.use([1, 2, 4, 5])
    assert [cache.num_cached(names) for names in ([1, 2, 3], [1, 2, 4, 5], [9])] == [2, 4, 0]
    cache.use([6])
    assert cache.num_cached([1, 2, 4, 5]) == 3
    assert cache.take_news() == CacheDelta(
        0,
        b"".join(name.to_bytes(8, "little") for name in (2, 1, 4, 6)),
        b"".join(name.to_bytes(8, "little") for name in (3, 5)),
    )
