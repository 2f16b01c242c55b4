"""Which workers of a node compute at the same time, and what that teaches the cost model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.controller import ClusterController
from scheduler.events import (
    PrefillDone,
    RequestArrived,
    RequestEnded,
    WorkerLeft,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.neighbours import Neighbours
from scheduler.placement import PlacementOptions
from scheduler.types import StepTimes, WorkerLoad, WorkerRole
from scheduler.worker_state import WorkerState, Workload
from tests.builders import make_worker

WORK = Workload(num_prompt_tokens=100, max_tokens=20, num_output_tokens=20, prefill_s=1.0)


def worker(worker_id: str, node: str) -> WorkerState:
    return WorkerState(replace(make_worker(worker_id, WorkerRole.PREFILL), node=node), WorkerLoad(), 0.0)


class Node:
    """Workers that compute a prompt, or do not."""

    def __init__(self, *nodes: str) -> None:
        self.neighbours = Neighbours()
        self.workers = [worker(str(number), node) for number, node in enumerate(nodes)]
        for each in self.workers:
            self.neighbours.add(each, 0.0)

    def begin(self, number: int, now: float) -> None:
        self.workers[number].begin_prefill(WORK, now)
        self.neighbours.changed(self.workers[number], now)

    def end(self, number: int, now: float) -> None:
        self.workers[number].end_prefill(WORK, now)
        self.neighbours.changed(self.workers[number], now)

    def take(self, number: int, now: float) -> float | None:
        return self.neighbours.take(self.workers[number], now)


def test_neighbours_count_for_the_part_of_a_workers_busy_time_that_they_compute() -> None:
    node = Node("a", "a", "a")
    node.begin(0, 1.0)  # computes until 9, eight seconds
    node.begin(1, 3.0)  # beside it from 3 to 7 and from 8 on
    node.end(1, 7.0)
    node.begin(1, 8.0)
    node.begin(2, 5.0 + 3.5)  # and this one from 8.5 on
    node.end(0, 9.0)
    assert node.neighbours.beside(node.workers[0]) == 2 and node.neighbours.beside(node.workers[1]) == 1
    assert node.take(0, 20.0) == pytest.approx((4 + 1 + 0.5) / 8)


def test_what_was_taken_does_not_count_again_and_what_goes_on_does() -> None:
    node = Node("a", "a")
    node.begin(0, 0.0)
    node.begin(1, 0.5)
    assert node.take(0, 1.0) == pytest.approx(0.5)
    node.end(1, 1.25)
    assert node.take(0, 2.0) == pytest.approx(0.25)
    node.end(0, 2.0)
    assert node.take(0, 3.0) is None  # it did not compute


def test_more_work_for_a_worker_that_computes_already_changes_nothing() -> None:
    node = Node("a", "a")
    for _ in range(3):
        node.begin(1, 0.0)
    node.begin(0, 0.0)
    node.end(1, 1.0)
    node.end(1, 2.0)
    assert node.take(0, 4.0) == pytest.approx(1.0)


def test_workers_of_other_nodes_and_of_none_are_no_neighbours() -> None:
    node = Node("a", "b", "", "")
    for number in range(4):
        node.begin(number, 0.0)
    assert [node.neighbours.beside(each) for each in node.workers] == [0, 0, 0, 0]
    assert [node.take(number, 1.0) for number in range(4)] == [0.0, 0.0, 0.0, 0.0]


def test_a_worker_that_left_slows_nobody_and_leaves_nothing_behind() -> None:
    node = Node("a", "a")
    node.begin(0, 0.0)
    node.begin(1, 0.0)
    node.neighbours.remove(node.workers[1], 1.0)
    node.end(1, 1.5)
    assert node.take(0, 2.0) == pytest.approx(0.5)
    node.neighbours.remove(node.workers[0], 2.0)
    assert not node.neighbours._nodes


def cluster(decode_node: str) -> ClusterController:
    controller = ClusterController(options=PlacementOptions("least_loaded"))
    for worker_id, role, node in (("p", WorkerRole.PREFILL, "a"), ("d", WorkerRole.DECODE, decode_node)):
        info = make_worker(worker_id, role, gemm_gflop_s=1.0, read_gb_s=0.1)  # 40 ms for the weights
        controller.handle(WorkerRegistered(replace(info, node=node)), 0.0)
    return controller


def teach(controller: ClusterController, beside_s: float, alone_s: float) -> None:
    """Decode steps of one sequence, every second time while a prompt is computed."""
    controller.handle(RequestArrived("first", 100, 20), 0.0)
    controller.handle(PrefillDone("first"), 0.0)
    for number in range(100):
        now = float(number)
        if number % 2:
            controller.handle(RequestArrived(str(number), 100, 20), now)
        steps = (StepTimes(4, 0, 0, 4, 4 * 110, 4 * (beside_s if number % 2 else alone_s)),)
        controller.handle(WorkerReported("d", 1, WorkerLoad(running=1), steps), now + 1)
        if number % 2:
            controller.handle(RequestEnded(str(number)), now + 1)
    controller.handle(RequestEnded("first", 20), 101.0)


@pytest.mark.parametrize(("node", "alone_s", "beside_s"), [("a", 0.04, 0.05), ("b", 0.045, 0.045)])
def test_steps_beside_a_prompt_on_the_same_node_teach_what_a_neighbour_costs(
    node: str, alone_s: float, beside_s: float
) -> None:
    controller = cluster(node)
    teach(controller, beside_s=0.05, alone_s=0.04)
    costs = controller._costs
    assert costs.decode_step_seconds("d", 1, 110, neighbours=0) == pytest.approx(alone_s, rel=0.03)
    assert costs.decode_step_seconds("d", 1, 110, neighbours=1) == pytest.approx(beside_s, rel=0.03)


def test_a_prompt_is_predicted_to_take_longer_while_a_neighbour_decodes() -> None:
    controller = cluster("a")
    alone = StepTimes(1, 100, 5050, 0, 0, 0.2)
    for number in range(60):
        controller.handle(RequestArrived(str(number), 100, 20), float(number))
        is_beside = number % 2
        step = replace(alone, seconds=0.25) if is_beside else alone
        controller.handle(WorkerReported("p", 1, WorkerLoad(running=1), (step,)), number + 0.5)
        controller.handle(PrefillDone(str(number)), number + 0.5)
        if is_beside:
            controller.handle(RequestEnded(str(number - 1), 20), number + 0.5)
            controller.handle(RequestEnded(str(number), 20), number + 0.5)
    predicted = [controller._costs.prefill_seconds("p", 100, 0, count) for count in (0, 1)]
    assert predicted == pytest.approx([0.2, 0.25], rel=0.03)


def test_a_node_whose_worker_has_left_has_one_neighbour_less() -> None:
    controller = cluster("a")
    controller.handle(RequestArrived("r", 100, 20), 0.0)
    controller.handle(WorkerLeft("p", 1), 1.0)
    (decode,) = controller._workers
    assert controller._neighbours.beside(decode) == 0
