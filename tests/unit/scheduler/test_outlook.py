"""What admission is told that one more request would meet, and what it holds back for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.admission import AdmissionControl
from scheduler.controller import ClusterController
from scheduler.events import PlaceRequest, PrefillDone, RequestArrived, RequestQueued, WorkerRegistered
from scheduler.placement import PlacementOptions
from scheduler.types import WorkerInfo, WorkerRole
from scheduler.urgency import ServiceClass, Urgency
from tests.unit.scheduler.test_cost_placement import BANDWIDTH, COMPUTE, SMALL, worker

PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
FLEX = Urgency(ServiceClass.BATCH)
OPTIONS = PlacementOptions("cost", ttft_target_s=2.0, tpot_target_s=0.1)


def controller_of(*infos: WorkerInfo) -> ClusterController:
    controller = ClusterController(options=OPTIONS)
    for info in infos:
        controller.handle(WorkerRegistered(info), 0.0)
    return controller


def test_an_idle_worker_whose_prompts_would_hold_up_decoding_is_not_taken_for_the_soonest() -> None:
    """Nothing is placed there, and what is held back for it would be placed on workers that are busy."""
    controller = controller_of(
        worker("p", PREFILL, COMPUTE), worker("d", DECODE, BANDWIDTH), worker("slow", COLOCATED, SMALL)
    )
    alone = controller.outlook(2000, 0.0)
    assert alone is not None
    for number in range(40):
        (command,) = controller.handle(RequestArrived(f"r{number}", 2000, 10), 0.0)
        assert isinstance(command, PlaceRequest) and command.placement.decode.worker_id == "d"
    outlook = controller.outlook(2000, 0.0)
    assert outlook is not None
    assert outlook.prefill_s == alone.prefill_s
    assert outlook.backlog_s == pytest.approx(40 * alone.prefill_s)


def test_a_worker_that_alone_takes_prompts_is_taken_for_the_soonest_however_slow() -> None:
    outlook = controller_of(worker("slow", COLOCATED, SMALL)).outlook(2000, 0.0)
    assert outlook is not None and outlook.prefill_s > OPTIONS.tpot_target_s


def test_batch_work_is_held_back_while_interactive_requests_run_and_no_decode_worker_has_room() -> None:
    """Colocated places are of no use to it: by their number alone there would be room."""
    infos = worker("d", DECODE, BANDWIDTH), worker("slow", COLOCATED, replace(SMALL, gemm_gflop_s=10_000.0))
    admission = AdmissionControl(
        controller_of(worker("p", PREFILL, COMPUTE), *(replace(info, max_num_seqs=4) for info in infos))
    )

    def arrive(name: str, urgency: Urgency) -> bool:
        (command,) = admission.handle(RequestArrived(name, 200, 100, urgency=urgency), 0.0)
        assert isinstance(command, PlaceRequest | RequestQueued)
        admission.handle(PrefillDone(name), 0.0)
        return isinstance(command, PlaceRequest)

    assert arrive("chat", Urgency())
    assert [arrive(f"job-{number}", FLEX) for number in range(6)] == [True] * 3 + [False] * 3
