"""Workers whose devices were said to be of one kind, and are not: placed by what was learned of them."""

from __future__ import annotations

import random
from dataclasses import replace
from math import exp

from hypothesis import given
from hypothesis import strategies as st

from scheduler.controller import ClusterController
from scheduler.cost_model import DRIFT_SLACK, DRIFT_STEP, CostModel
from scheduler.events import (
    Command,
    PlaceRequest,
    PrefillDone,
    RequestArrived,
    RequestEnded,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.types import Phase, StepTimes, WorkerInfo, WorkerLoad, WorkerRole
from tests.builders import repeatable
from tests.unit.scheduler.test_cost_placement import BANDWIDTH, Fleet, best_of_all, judged, predicted, worker

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
ALIKE = exp(2 * DRIFT_SLACK * DRIFT_STEP)  # times of workers of one kind differ by no more than this factor
EVERYTHING, NOTHING = 1e6, 1e-6  # a target that everything keeps, and one that nothing does


def steps(info: WorkerInfo, times_as_long: float, seed: int = 0) -> list[StepTimes]:
    """Of prompts and of decoding, on a device that takes so many times as long as it was said to."""
    rng, told, found = random.Random(seed), CostModel(), []
    told.add(info)
    for _ in range(30):
        num_tokens, batch = rng.randint(50, 2048), rng.randint(1, 64)
        pairs, context = num_tokens * (num_tokens + 1) // 2, batch * rng.randint(100, 3000)
        prefill_s = told.prefill_seconds(info.worker_id, num_tokens)
        step_s = told.decode_step_seconds(info.worker_id, batch, context)
        if info.role is not DECODE:
            found.append(StepTimes(1, num_tokens, pairs, 0, 0, times_as_long * prefill_s))
        if info.role is not PREFILL:
            found.append(StepTimes(1, 0, 0, batch, context, times_as_long * step_s))
    return found


class Cluster:
    """A controller and its clock; of each worker it has learned how many times as long as was said it takes."""

    def __init__(self, workers: dict[WorkerInfo, float]) -> None:
        self.controller = ClusterController(heartbeat_timeout_s=EVERYTHING)
        self.now = 0.0
        for info, times_as_long in workers.items():
            self.controller.handle(WorkerRegistered(info), self.now)
            self.controller.handle(
                WorkerReported(info.worker_id, 1, WorkerLoad(), tuple(steps(info, times_as_long))), 0
            )

    def place(self, request_id: str, num_prompt_tokens: int) -> tuple[str, str]:
        """Where it is computed, and where decoded."""
        (command,) = self.handle(RequestArrived(request_id, num_prompt_tokens, 10))
        assert isinstance(command, PlaceRequest)
        placement = command.placement
        return (placement.prefill or placement.decode).worker_id, placement.decode.worker_id

    def handle(self, event: RequestArrived | PrefillDone | RequestEnded) -> list[Command]:
        return self.controller.handle(event, self.now)


def test_one_request_at_a_time_is_always_computed_and_decoded_by_the_faster_worker_of_a_kind() -> None:
    speeds = {"slow": 5.0, "fast": 1.0}
    cluster = Cluster(
        {worker(f"{name}-{role}", role, BANDWIDTH): speeds[name] for role in (PREFILL, DECODE) for name in speeds}
    )
    for number in range(20):
        assert cluster.place(f"r{number}", 2048) == ("fast-prefill", "fast-decode")
        cluster.now += 0.3
        cluster.handle(PrefillDone(f"r{number}"))
        cluster.now += 0.3
        cluster.handle(RequestEnded(f"r{number}", 10, 10))


def test_the_slower_worker_helps_once_the_faster_one_is_busy_for_longer() -> None:
    cluster = Cluster(
        {
            worker("slow", PREFILL, BANDWIDTH): 3.5,
            worker("fast", PREFILL, BANDWIDTH): 1.0,
            worker("d", DECODE, BANDWIDTH): 1.0,
        }
    )
    computed_by = [cluster.place(f"r{number}", 2048)[0] for number in range(7)]
    assert computed_by == ["fast", "fast", "fast", "slow", "fast", "fast", "fast"]


def test_admission_hears_of_the_faster_worker() -> None:
    """It refuses by what it hears."""
    cluster = Cluster(
        {
            worker("slow", PREFILL, BANDWIDTH): 5.0,
            worker("fast", PREFILL, BANDWIDTH): 1.0,
            worker("d", DECODE, BANDWIDTH): 1.0,
        }
    )
    told = CostModel()
    told.add(worker("fast", PREFILL, BANDWIDTH))
    told_s = told.prefill_seconds("fast", 2048)
    for number in range(2):
        outlook = cluster.controller.outlook(2048, cluster.now)
        assert outlook is not None and outlook.backlog_s + outlook.prefill_s < 3 * told_s
        cluster.place(f"r{number}", 2048)


def test_a_full_decode_worker_yields_to_one_of_its_kind_that_is_slower_by_little() -> None:
    """A step takes hardly longer for more sequences; what does not fit waits."""
    infos = [replace(worker(name, DECODE, BANDWIDTH), max_num_seqs=4) for name in ("slow", "fast")]
    cluster = Cluster({worker("p", PREFILL, BANDWIDTH): 1.0, infos[0]: 1.05, infos[1]: 1.0})
    decoded_by = [cluster.place(f"r{number}", 200)[1] for number in range(8)]
    assert sorted(decoded_by) == ["fast"] * 4 + ["slow"] * 4


# Against a search over all pairs

speeds = st.sampled_from([0.3, 0.5, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0])
prefilling = st.tuples(speeds, st.sampled_from([0.0, 0.1, 0.3, 1.0, 5.0]))
decoding = st.tuples(speeds, st.integers(0, 100))


@given(
    st.lists(prefilling, min_size=2, max_size=6),
    st.lists(decoding, min_size=2, max_size=6),
    st.sampled_from([40, 500, 2000, 4000]),
    st.sampled_from([8, 64]),
    st.sampled_from([EVERYTHING, NOTHING]),
)
@repeatable(100)
def test_what_is_found_is_as_good_as_the_best_but_for_what_workers_of_a_kind_differ_by(
    prefills: list[tuple[float, float]],
    decodes: list[tuple[float, int]],
    num_prompt_tokens: int,
    max_num_seqs: int,
    target_s: float,
) -> None:
    """The cost where targets can be kept, and else the time until the end."""
    infos = [worker(f"p{index}", PREFILL, BANDWIDTH) for index in range(len(prefills))]
    infos += [
        replace(worker(f"d{index}", DECODE, BANDWIDTH), max_num_seqs=max_num_seqs) for index in range(len(decodes))
    ]
    fleet = Fleet(*infos, ttft_s=target_s, tpot_s=target_s)
    for info, (times_as_long, _) in zip(infos, [*prefills, *decodes], strict=True):
        for each in steps(info, times_as_long):
            fleet.costs.observe(info.worker_id, each)
        fleet.table.learned(fleet.worker(info.worker_id))
    for index, (_, prefill_s) in enumerate(prefills):
        fleet.burden(f"p{index}", prefill_s)
    for index, (_, num_decodes) in enumerate(decodes):
        fleet.burden(f"d{index}", decodes=num_decodes)
    request = RequestArrived("r", num_prompt_tokens, 500)
    kept, found = judged(fleet, predicted(fleet, request, fleet.choose(request)))
    best_kept, best = best_of_all(fleet, request)
    assert kept == best_kept
    assert found <= ALIKE * best


def test_kinds_do_not_grow_with_the_workers_that_differ_a_little() -> None:
    """A hundred, each off by some percent, whose steps vary by ten."""
    infos = [worker(f"w{index}", PREFILL, BANDWIDTH) for index in range(100)]
    fleet, rng = Fleet(*infos), random.Random(1)
    for info in infos:
        for each in steps(info, rng.lognormvariate(0, 0.03), rng.randrange(1 << 30)):
            fleet.costs.observe(info.worker_id, replace(each, seconds=each.seconds * rng.lognormvariate(0, 0.1)))
            fleet.table.learned(fleet.worker(info.worker_id))
    assert len(fleet.table.best(Phase.PREFILL)) <= 3
