"""A cluster of three kinds of devices in virtual time: who computes what, and roles that follow a load that turns.

Admission, controller and batchers are the real ones; steps take as long as the cost model says of the devices.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.policies import SHAPE
from scheduler.cost_model import CostModel
from scheduler.demand import decode_rate
from scheduler.placement import PlacementOptions
from scheduler.sim.simulator import Simulator
from scheduler.sim.workers import SimulatedRequest
from scheduler.types import DeviceProfile, WorkerInfo, WorkerLoad, WorkerRole
from scheduler.urgency import ServiceClass, Urgency
from scheduler.worker_state import WorkerState
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


TURN_S, SETTLED_S, END_S = 60.0, 135.0, 170.0
QUICK = replace(TARGETS, tpot_target_s=0.2)
LONG_JOBS = (1200, 120)


class TurningCluster:
    """Devices of three kinds with room for all KV, and which roles have changed when."""

    def __init__(self, roles: dict[str, WorkerRole], options: PlacementOptions) -> None:
        devices = {"p0": COMPUTE, "p1": COMPUTE, "p2": COMPUTE, "d0": BANDWIDTH, "c0": CHEAP}
        infos = [replace(worker(name, role, devices[name]), num_blocks=16_000) for name, role in roles.items()]
        self.sim = Simulator(infos, options, tokens_per_name=16, max_tokens=500)
        self.moves: list[tuple[float, str, WorkerRole]] = []
        self._roles = dict(roles)
        self._look()

    def _look(self) -> None:
        for each in self.sim.controller.snapshot().workers:
            name, role = each.info.worker_id, each.info.role
            if self._roles[name] is not role:
                self._roles[name] = role
                self.moves.append((self.sim.time.now, name, role))
        self.sim.time.after(1.0, self._look)


def long_jobs(count: int) -> list[SimulatedRequest]:
    flex = Urgency(ServiceClass.BATCH)
    return [SimulatedRequest(f"job-{number}", 0.0, *LONG_JOBS, urgency=flex) for number in range(count)]


def decoded_tokens_s(load: Sequence[SimulatedRequest], decode: str, from_s: float, until_s: float) -> float:
    """Of answers of a worker that ended then."""
    ended = [each for each in load if each.finished_s is not None and from_s <= each.finished_s < until_s]
    there = [each for each in ended if each.placement is not None and each.placement.decode.worker_id == decode]
    return sum(each.num_output_tokens for each in there) / (until_s - from_s)


def left_tokens_s(info: WorkerInfo, answers_tokens_s: float) -> float:
    """What a worker could decode of jobs in the time that answers leave, in batches that keep the target."""
    costs = CostModel()
    costs.add(info)

    def rate(sizes: tuple[int, int]) -> float:
        state = WorkerState(info, WorkerLoad(), 0.0)
        return decode_rate(state, costs, sizes[0] + sizes[1] // 2, QUICK.tpot_target_s)

    return rate(LONG_JOBS) * (1 - answers_tokens_s / rate(ANSWERS))


def test_a_role_follows_the_turn_while_jobs_fill_what_is_left_and_interactive_requests_keep_their_targets() -> None:
    """Long prompts, then long answers, and jobs that wait all the time: they get 80 % of what is left at least."""
    cluster = TurningCluster({"p0": PREFILL, "p1": PREFILL, "p2": PREFILL, "d0": DECODE, "c0": COLOCATED}, QUICK)
    prompts, answers = requests(PROMPTS, 4.0, 0.0, TURN_S), requests(ANSWERS, 4.0, TURN_S, END_S)
    jobs = long_jobs(860)
    cluster.sim.run([*prompts, *answers, *jobs])
    assert cluster.sim.time.now > END_S, "there was not work enough"

    ((moved_s, moved, role),) = cluster.moves
    assert TURN_S < moved_s < SETTLED_S and moved.startswith("p") and role is DECODE
    compute_heavy = {"p0", "p1", "p2"}
    assert set(computed_by([*prompts, *jobs])) <= compute_heavy and set(decoded_by(prompts)) == {"d0"}
    assert set(decoded_by(answers)) <= {"d0", "c0", moved} and set(decoded_by(jobs)) == {"d0", moved}

    settled = [each for each in answers if each.arrival_s >= SETTLED_S]
    for load in (prompts, settled):
        assert p99([each.ttft_s for each in load]) <= QUICK.ttft_target_s
        assert p99([each.tpot_s for each in load]) <= QUICK.tpot_target_s

    window, infos = (SETTLED_S, END_S), cluster.sim.workers
    left = sum(left_tokens_s(infos[name].info, decoded_tokens_s(answers, name, *window)) for name in ("d0", moved))
    assert sum(decoded_tokens_s(jobs, name, *window) for name in ("d0", moved)) >= 0.8 * left
