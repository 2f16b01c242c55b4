"""A cluster of three kinds of devices in virtual time: who computes what, and roles that follow a load that turns.

Admission, controller and batchers are the real ones; steps take as long as the cost model says of the devices.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.policies import SHAPE
from scheduler.placement import PlacementOptions
from scheduler.sim.simulator import Simulator
from scheduler.sim.workers import SimulatedRequest
from scheduler.types import DeviceProfile, WorkerInfo, WorkerRole
from scheduler.urgency import ServiceClass, Urgency
from tests.builders import make_spec, make_worker

PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
COMPUTE = DeviceProfile("compute-heavy", 80_000, 150, 80 << 30, price_per_hour=4.0)
BANDWIDTH = DeviceProfile("bandwidth-heavy", 20_000, 500, 80 << 30, price_per_hour=2.0)
CHEAP = DeviceProfile("slow and cheap", 10_000, 150, 80 << 30, price_per_hour=0.2)
TARGETS = PlacementOptions("cost", ttft_target_s=2.0, tpot_target_s=0.25, roles_follow_load=True)
PROMPTS, ANSWERS, SMALL = (2000, 8), (50, 300), (60, 20)  # tokens of prompt and answer


def worker(name: str, role: WorkerRole, device: DeviceProfile) -> WorkerInfo:
    info = make_worker(name, role, spec=make_spec(block_size=16))
    return replace(info, device=device, shape=SHAPE, num_blocks=4_000, max_num_batched_tokens=512, max_num_seqs=128)


def cluster(options: PlacementOptions = TARGETS) -> Simulator:
    places = (
        *(("p0", PREFILL, COMPUTE), ("p1", PREFILL, COMPUTE)),
        *(("d0", DECODE, BANDWIDTH), ("d1", DECODE, COMPUTE)),
        ("c0", COLOCATED, CHEAP),
    )
    return Simulator([worker(*place) for place in places], options, tokens_per_name=16, max_tokens=500)


def requests(sizes: tuple[int, int], per_s: float, from_s: float, until_s: float) -> list[SimulatedRequest]:
    """Poisson arrivals, the same in every run; no two have a prefix in common."""
    rng, at_s, found = random.Random(f"{sizes}"), from_s, []
    while (at_s := at_s + rng.expovariate(per_s)) < until_s:
        found.append(SimulatedRequest(f"{sizes}-{len(found)}", at_s, *sizes))
    return found


def computed_by(load: Sequence[SimulatedRequest]) -> Counter[str]:
    """Requests by where their prompts were computed."""
    placements = [request.placement for request in load if request.placement is not None]
    return Counter((placed.prefill or placed.decode).worker_id for placed in placements)


def decoded_by(load: Sequence[SimulatedRequest]) -> Counter[str]:
    return Counter(request.placement.decode.worker_id for request in load if request.placement is not None)


def p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def test_each_phase_goes_to_the_device_that_suits_it() -> None:
    """Long prompts to the compute-heavy, small requests to the cheap one, which does both phases of them."""
    sim = cluster()
    long, small = requests(PROMPTS, 0.5, 0.0, 60.0), requests(SMALL, 0.5, 0.0, 60.0)
    sim.run([*long, *small])
    assert set(computed_by(long)) <= {"p0", "p1"}
    assert decoded_by(long)["d0"] >= 0.9 * len(long)
    assert computed_by(small)["c0"] >= 0.9 * len(small) and decoded_by(small)["c0"] >= 0.9 * len(small)
    assert p99([each.ttft_s for each in (*long, *small)]) <= TARGETS.ttft_target_s
    assert p99([each.tpot_s for each in (*long, *small)]) <= TARGETS.tpot_target_s


def keeps_targets(load: Sequence[SimulatedRequest], from_s: float) -> bool:
    """Of those that came after roles had had time to follow."""
    settled = [request for request in load if request.arrival_s >= from_s]
    ttft_s, tpot_s = (p99([getattr(each, name) for each in settled]) for name in ("ttft_s", "tpot_s"))
    return ttft_s <= TARGETS.ttft_target_s and tpot_s <= TARGETS.tpot_target_s


def turning_load() -> tuple[list[SimulatedRequest], list[SimulatedRequest]]:
    """Short questions with long answers, then long prompts with short ones."""
    return requests(ANSWERS, 4.0, 0.0, 200.0), requests(PROMPTS, 5.6, 200.0, 450.0)


def test_roles_follow_a_mix_that_turns_and_targets_are_kept() -> None:
    sim = cluster()
    roles: list[set[str]] = []

    def look() -> None:
        workers = sim.controller.snapshot().workers
        roles.append({each.info.worker_id for each in workers if each.info.role is PREFILL})

    for at_s in (5.0, 199.0, 449.0):
        sim.time.at(at_s, look)
    answers, prompts = turning_load()
    sim.run([*answers, *prompts])
    assert all(each.finished_s is not None for each in (*answers, *prompts)), "a request was lost"
    assert [len(each) for each in roles] == [2, 1, 3]
    assert not any("d0" in each for each in roles), "the bandwidth-heavy device is the last to prefill"
    assert keeps_targets(answers, 120.0) and keeps_targets(prompts, 350.0)


def test_the_same_load_misses_the_targets_where_roles_stay() -> None:
    sim = cluster(replace(TARGETS, roles_follow_load=False))
    answers, prompts = turning_load()
    sim.run([*answers, *prompts])
    assert keeps_targets(answers, 120.0) and not keeps_targets(prompts, 350.0)


CHATS, JOBS, HORIZON_S = (300, 40), (600, 60), 30.0


def night_jobs(count: int) -> list[SimulatedRequest]:
    """All there at once, and more than can be done in the time."""
    flex = Urgency(ServiceClass.BATCH)
    return [SimulatedRequest(f"job-{number}", 0.0, *JOBS, urgency=flex) for number in range(count)]


def tokens_done(load: Sequence[SimulatedRequest]) -> int:
    """Of what ended within the time."""
    ended = [each for each in load if each.finished_s is not None and each.finished_s <= HORIZON_S]
    assert len(ended) < len(load), "there was not work enough"
    return sum(each.num_prompt_tokens + each.num_output_tokens for each in ended)


def test_chats_keep_their_targets_while_batch_work_fills_what_they_leave() -> None:
    """Batch work gets at least 80 % of what it gets alone."""
    still = replace(TARGETS, roles_follow_load=False)
    alone, beside, chats = night_jobs(600), night_jobs(600), requests(CHATS, 4.0, 0.0, HORIZON_S)
    cluster(still).run(alone)
    cluster(still).run([*beside, *chats])
    assert p99([each.ttft_s for each in chats]) <= TARGETS.ttft_target_s
    assert p99([each.tpot_s for each in chats]) <= TARGETS.tpot_target_s
    assert tokens_done(beside) >= 0.8 * tokens_done(alone)
