"""No event makes the scheduler look at all workers: what it looks at does not grow with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from scheduler.admission import AdmissionControl, AdmissionOptions
from scheduler.controller import ClusterController
from scheduler.demand import MOST_ASKED
from scheduler.events import Event, PrefillDone, RequestArrived, RequestEnded, Tick, WorkerRegistered, WorkerReported
from scheduler.placement import PlacementOptions
from scheduler.policies import POLICIES
from scheduler.types import WorkerLoad, WorkerRole
from scheduler.urgency import ORDINARY, ServiceClass, Urgency
from scheduler.worker_state import WorkerState
from tests.builders import make_worker

MOST_LOOKED_AT = 16  # three kinds of workers in two pools, each worker of the placement, and draws
ROLES = (WorkerRole.PREFILL, WorkerRole.DECODE)
ASKS_MOST = AdmissionOptions(refuses_late=True, tenant_weights=(("a", 1.0), ("b", 2.0)))  # for an outlook each time


def make_cluster(policy: str, num_workers: int) -> AdmissionControl:
    """Three kinds of devices, half of each in either pool."""
    admission = AdmissionControl(ClusterController(options=PlacementOptions(policy)), ASKS_MOST)
    for number in range(num_workers):
        speed = 100.0 * 2 ** (number % 3)
        info = make_worker(f"w{number:04}", ROLES[number % 2], gemm_gflop_s=speed)
        admission.handle(WorkerRegistered(replace(info, max_num_seqs=4)), 0.0)
    return admission


@contextmanager
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The workers of which anything is read."""
    seen: set[int] = set()

    def read(self: WorkerState, name: str) -> object:
        seen.add(id(self))
        return object.__getattribute__(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(WorkerState, "__getattribute__", read, raising=False)
        yield seen


def events_of(number: int) -> list[Event]:
    name, urgency = f"r{number}", (ORDINARY, Urgency(ServiceClass.BATCH))[number % 2]
    arrived = RequestArrived(name, 8 + number % 5, 8, tenant="ab"[number % 2], urgency=urgency)
    beat = WorkerReported(f"w{number % 10:04}", 1, WorkerLoad())
    return [arrived, PrefillDone(name), beat, RequestEnded(name, 3, 3)]


@pytest.mark.parametrize("num_workers", [10, 1000])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_event_of_a_request_looks_at_a_few_workers(
    policy: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission = make_cluster(policy, num_workers)
    most = 0
    for number in range(40):
        for event in events_of(number):
            with looked_at(monkeypatch) as seen:
                admission.handle(event, 0.1 * number)
            most = max(most, len(seen))
    assert 0 < most <= MOST_LOOKED_AT


def flipping_cluster(num_workers: int) -> ClusterController:
    """One worker prefills, all others decode, and of late much more work came to the one."""
    options = PlacementOptions("least_loaded", roles_follow_load=True)
    controller = ClusterController(options=options, heartbeat_timeout_s=1e9)
    for number in range(num_workers):
        info = make_worker(f"w{number:04}", ROLES[number > 0], gemm_gflop_s=1.0)
        controller.handle(WorkerRegistered(info), 0.0)
    for number in range(2000):
        controller.handle(RequestArrived(f"r{number}", 500, 1), 60.0)
    return controller


@pytest.mark.parametrize("num_workers", [1000, 4000])
def test_planning_roles_looks_at_a_part_of_the_workers(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = flipping_cluster(num_workers)
    most = 0
    for step in range(60):
        with looked_at(monkeypatch) as seen:
            controller.handle(Tick(), 60.0 + 2.0 * step)
        most = max(most, len(seen))
    assert MOST_ASKED // 2 < most <= 2 * MOST_ASKED + MOST_LOOKED_AT
    changing = [each.info.worker_id for each in controller.snapshot().workers if each.duty.next_role]
    assert len(changing) == 1, "nothing was decided"
