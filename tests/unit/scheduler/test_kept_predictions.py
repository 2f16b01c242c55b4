"""What is kept of workers between events, against the same computed anew from their books and the cost model."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.controller import ClusterController
from scheduler.events import (
    PlaceRequest,
    PrefillDone,
    RequestArrived,
    RequestEnded,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.types import Phase, StepTimes, WorkerLoad, WorkerRole
from scheduler.worker_state import WorkerState
from tests.builders import make_worker, repeatable

ROLES = (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED)
WORKERS = [f"w{number}" for number in range(9)]


def cluster() -> ClusterController:
    """Three workers of each role, one of each on a node; all of one kind, so that the best are found by rank."""
    controller = ClusterController()
    for number, name in enumerate(WORKERS):
        info = make_worker(name, ROLES[number % 3])
        controller.handle(WorkerRegistered(replace(info, num_blocks=4000, node="n" if number < 3 else "")), 0.0)
    return controller


def report(name: str, number: int) -> WorkerReported:
    """With sequences that were placed by somebody else, and steps that took longer or shorter than was predicted."""
    steps = StepTimes(2, 10 * (number % 2), 100 * (number % 2), 2 + number % 5, 100 * number, 0.001 * (1 + number))
    return WorkerReported(name, 1, WorkerLoad(running=number % 7), (steps,))


def rank(controller: ClusterController, phase: Phase, worker: WorkerState) -> tuple[float | str, ...]:
    """As docs/placement.md has it: prefill by when it would be free, decode by a typical answer of 128 tokens."""
    if worker.role is WorkerRole.PREFILL:
        return (worker.free_at_s, worker.requests_placed, worker.worker_id)
    step_s, _ = steps_s(controller, worker)
    return (worker.prefill_s + 128 * step_s, worker.requests_placed, worker.worker_id)


def steps_s(controller: ClusterController, worker: WorkerState) -> tuple[float, float]:
    """Of the batch as it is, at least one sequence, and of one more without its context."""
    batch_size = worker.num_decodes + worker.num_foreign
    context_tokens = worker.context_tokens
    if worker.num_foreign and worker.num_decodes:
        context_tokens = context_tokens * batch_size // worker.num_decodes
    predict = controller._costs.decode_step_seconds
    return (
        predict(worker.worker_id, max(1, batch_size), context_tokens),
        predict(worker.worker_id, batch_size + 1, context_tokens),
    )


def check(controller: ClusterController) -> None:
    table = controller._workers
    for worker in table:
        if worker.role is not WorkerRole.PREFILL:
            assert (worker.step_s, worker.joined_step_s) == steps_s(controller, worker)
    for phase in Phase:
        for role in (each for each in ROLES if each.takes(phase)):
            of_role = [worker for worker in table if worker.role is role]
            best = min(of_role, key=lambda worker: rank(controller, phase, worker))
            assert best in table.best(phase)


operations = st.lists(
    st.tuples(st.sampled_from(["place", "first", "end", "report"]), st.sampled_from(WORKERS), st.integers(0, 60)),
    max_size=80,
)


@given(operations)
@repeatable(60)
def test_what_is_kept_of_workers_is_what_would_be_computed_anew(drawn: list[tuple[str, str, int]]) -> None:
    controller, live = cluster(), list[str]()
    for step, (operation, name, number) in enumerate(drawn):
        now, request_id = 0.01 * step, f"r{step}"
        if operation == "place":
            (command,) = controller.handle(RequestArrived(request_id, 20 + 3 * number, 50), now)
            assert isinstance(command, PlaceRequest)
            live.append(request_id)
        elif operation == "first" and live:
            controller.handle(PrefillDone(live[number % len(live)]), now)
        elif operation == "end" and live:
            controller.handle(RequestEnded(live.pop(number % len(live)), 1 + number), now)
        elif operation == "report":
            controller.handle(report(name, number), now)
        check(controller)
