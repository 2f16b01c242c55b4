"""Pools that scale with a load, in virtual time: admission, controller, batchers and scaler are real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

from engine.autoscaling import INTERVAL_S, Autoscaling
from scheduler.admission import AdmissionOptions
from scheduler.autoscaler import PoolLimits
from scheduler.placement import PlacementOptions
from scheduler.sim.simulator import Simulator
from scheduler.sim.workers import SimulatedRequest
from scheduler.types import WorkerInfo, WorkerRole
from scheduler.urgency import ORDINARY, ServiceClass, Urgency
from tests.builders import make_spec, make_worker
from tests.fakes import FakeNodeMarket

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
BATCH = Urgency(ServiceClass.BATCH)
TTFT_TARGET_S, TPOT_TARGET_S = 2.0, 0.1
TARGETS = {PREFILL: TTFT_TARGET_S, DECODE: TPOT_TARGET_S}
OPTIONS = PlacementOptions("least_loaded", TTFT_TARGET_S, TPOT_TARGET_S)  # never computes prompts on decode workers
PATIENT = AdmissionOptions(1 << 30, TTFT_TARGET_S, TPOT_TARGET_S)
LOAD_S = 10.0  # from when a worker is asked for until it serves


def a_worker(role: WorkerRole, number: int, num_places: int = 8, num_blocks: int = 4096) -> WorkerInfo:
    """A decode step takes 20 ms or little more, a prompt token 0.4 ms."""
    info = make_worker(f"{role.value}-{number}", role, spec=make_spec(block_size=16))
    device = replace(info.device, gemm_gflop_s=500.0, read_gb_s=16.0)
    shape = replace(info.shape, weight_bytes=3.2e8, head_bytes=4e7, linear_flops=1.9e8, head_flops=1e7)
    return replace(info, device=device, shape=shape, num_blocks=num_blocks, max_num_seqs=num_places)


class Cluster:
    """Starts with one worker of each role."""

    def __init__(self, num_places: int = 8, num_blocks: int = 4096, admission: AdmissionOptions = PATIENT) -> None:
        self._make = partial(a_worker, num_places=num_places, num_blocks=num_blocks)
        workers = [self._make(PREFILL, 0), self._make(DECODE, 0)]
        self.sim = Simulator(workers, OPTIONS, tokens_per_name=16, max_tokens=400, admission=admission)
        self.counts = {PREFILL: 1, DECODE: 1}
        self._coming = {PREFILL: 0, DECODE: 0}
        self._autoscaling = Autoscaling({role: PoolLimits(1, 6) for role in TARGETS}, TARGETS, FakeNodeMarket())
        self._look()

    def _look(self) -> None:
        snapshot = self.sim.controller.snapshot()
        changes = self._autoscaling.decide(snapshot, self.counts, self._coming, self.sim.time.now)
        for role, wanted in changes.items():
            for number in range(self.counts[role], wanted):
                self._coming[role] += 1
                self.sim.time.after(LOAD_S, partial(self._join, role, number))
            self.counts[role] = wanted
        self.sim.time.after(INTERVAL_S, self._look)

    def _join(self, role: WorkerRole, number: int) -> None:
        self._coming[role] -= 1
        self.sim.join(self._make(role, number))

    def run(
        self, seconds: float, per_second: float, sizes: tuple[int, int], urgency: Urgency = ORDINARY
    ) -> Sequence[SimulatedRequest]:
        """Requests of that many prompt and output tokens come evenly."""
        requests = [
            SimulatedRequest(f"r{number}", number / per_second, *sizes, urgency=urgency)
            for number in range(round(seconds * per_second))
        ]
        self.sim.run(requests)
        return requests


def mean_ttft_s(requests: Sequence[SimulatedRequest]) -> float:
    return sum(each.ttft_s for each in requests) / len(requests)


def num_refused(requests: Sequence[SimulatedRequest]) -> int:
    return sum(each.refused_s is not None for each in requests)


def test_a_decode_pool_whose_places_are_out_grows_until_nobody_waits() -> None:
    """Its latency is good, for no more are placed than it decodes at once; the others wait before the scheduler."""
    cluster = Cluster()
    requests = cluster.run(120, 2.5, (100, 200))
    assert cluster.counts[PREFILL] == 1
    assert 2 <= cluster.counts[DECODE] <= 4, "the work needs two, those that have waited perhaps more"
    assert mean_ttft_s(requests[:80]) > TTFT_TARGET_S, "the load was to be too much for one"
    assert mean_ttft_s(requests[-80:]) < TTFT_TARGET_S


def test_a_prefill_pool_that_leaves_no_places_for_others_grows_until_nobody_waits() -> None:
    """All places are held by requests whose prompts wait for their turn, which is no more than the target allows."""
    cluster = Cluster(num_places=4)
    requests = cluster.run(120, 4.0, (1000, 2))
    assert cluster.counts[DECODE] == 1
    assert 2 <= cluster.counts[PREFILL] <= 4
    assert mean_ttft_s(requests[:80]) > TTFT_TARGET_S
    assert mean_ttft_s(requests[-80:]) < TTFT_TARGET_S


def test_a_decode_pool_whose_blocks_are_out_grows_until_nobody_waits() -> None:
    """Those beyond them are placed, and wait on the worker."""
    cluster = Cluster(num_places=256, num_blocks=120)
    requests = cluster.run(120, 2.8, (100, 200))
    assert cluster.counts[DECODE] >= 2
    assert mean_ttft_s(requests[:80]) > TTFT_TARGET_S
    assert mean_ttft_s(requests[-80:]) < TTFT_TARGET_S


def test_a_load_that_is_served_in_time_grows_nothing() -> None:
    cluster = Cluster()
    requests = cluster.run(120, 1.2, (100, 200))
    assert cluster.counts == {PREFILL: 1, DECODE: 1}
    assert mean_ttft_s(requests) < TTFT_TARGET_S


def test_batch_work_that_waits_for_what_is_left_over_grows_nothing() -> None:
    cluster = Cluster()
    cluster.run(60, 3.0, (100, 200), BATCH)
    assert cluster.counts == {PREFILL: 1, DECODE: 1}


LATE = replace(PATIENT, refuses_late=True)
FULL = replace(PATIENT, max_queued_requests=4)
THRICE = {  # what one worker of the role can do
    "decode workers are late": (DECODE, 6.0, (100, 200), LATE),
    "prefill workers are late": (PREFILL, 7.5, (1000, 2), LATE),
    "few may wait for decode workers": (DECODE, 6.0, (100, 200), FULL),
}


@pytest.mark.parametrize("case", THRICE)
def test_a_pool_for_want_of_which_requests_are_refused_grows_until_hardly_any_is(case: str) -> None:
    """Those that are placed keep every target, and no more are placed than can."""
    role, per_second, sizes, admission = THRICE[case]
    cluster = Cluster(admission=admission)
    requests = cluster.run(180, per_second, sizes)
    tenth = len(requests) // 10
    assert num_refused(requests[:tenth]) > tenth / 3, "the load was to be too much for one"
    assert num_refused(requests[-tenth:]) <= tenth / 20
    assert 4 <= cluster.counts[role] <= 6
    assert cluster.counts[DECODE if role is PREFILL else PREFILL] <= 2


def test_prompts_that_would_be_late_on_any_number_of_workers_grow_nothing() -> None:
    cluster = Cluster(admission=LATE)
    requests = cluster.run(60, 2.0, (6000, 2))
    assert num_refused(requests) == len(requests)
    assert cluster.counts == {PREFILL: 1, DECODE: 1}


def test_batch_work_that_finds_the_queue_full_grows_nothing() -> None:
    cluster = Cluster(admission=FULL)
    requests = cluster.run(60, 6.0, (100, 200), BATCH)
    assert num_refused(requests) > len(requests) / 3
    assert cluster.counts == {PREFILL: 1, DECODE: 1}
