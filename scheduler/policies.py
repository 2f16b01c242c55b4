"""The placement policies by name: those that people compare, each a few lines, and ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from kvcache.errors import ConfigError
from scheduler.cost_model import CostModel
from scheduler.cost_placement import CostPlacement
from scheduler.events import RequestArrived
from scheduler.placement import (
    NUM_HOLDERS,
    Choice,
    Cluster,
    PlacementOptions,
    PlacementPolicy,
    can_hand_over,
    one_group,
    prefills_in_place,
)
from scheduler.types import ClusterSnapshot, DutyState, Phase
from scheduler.worker_state import WorkerState
from scheduler.worker_table import Rank

_MASK = (1 << 64) - 1


def _rate(phase: Phase, worker: WorkerState) -> float:
    device = worker.info.device
    return device.gemm_gflop_s if phase is Phase.PREFILL else device.read_gb_s


def _load(phase: Phase, worker: WorkerState) -> Rank:
    # Equal load, as in an idle cluster: the one that got fewer requests so far, so that work goes round.
    load = worker.tokens_in_flight / _rate(phase, worker)
    return (load, worker.requests_in_flight, worker.requests_placed, worker.info.worker_id)


class _PerPhase:
    """Chooses for each phase by itself, and prefills in place on colocated workers only."""

    phases = tuple(Phase)
    ranking = staticmethod(_load)
    grouping = staticmethod(one_group)

    def choose(self, request: RequestArrived, num_output_tokens: int, cluster: Cluster, now: float) -> Choice:
        decode = cluster.bound_to(request) or self.pick(Phase.DECODE, request, cluster)
        if prefills_in_place(decode):
            return Choice(decode)
        prefill = self.pick(Phase.PREFILL, request, cluster)
        # Only a colocated worker's KV may not fit; it then does both phases.
        return Choice(decode, prefill) if can_hand_over(prefill, decode) else Choice(prefill)

    def pick(self, phase: Phase, request: RequestArrived, cluster: Cluster) -> WorkerState:
        raise NotImplementedError


class RoundRobin(_PerPhase):
    """One worker after the other."""

    def __init__(self) -> None:
        self._turns = dict.fromkeys(Phase, 0)

    def pick(self, phase: Phase, request: RequestArrived, cluster: Cluster) -> WorkerState:
        workers = cluster.taking(phase)
        position = _from(workers, self._turns[phase], request.avoid)
        self._turns[phase] = position + 1
        return workers[position]


class Random(_PerPhase):
    """Any worker, each as likely as the other. The draws follow from the seed."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def pick(self, phase: Phase, request: RequestArrived, cluster: Cluster) -> WorkerState:
        workers = cluster.taking(phase)
        return workers[_from(workers, self.draw(), request.avoid)]

    def draw(self) -> int:
        """64 bits of SplitMix64 (Steele et al., OOPSLA 2014)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        bits = self._state
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
        return bits ^ (bits >> 31)


class PowerOfTwo(Random):
    """The less loaded of two drawn (Mitzenmacher, IEEE TPDS 2001)."""

    def pick(self, phase: Phase, request: RequestArrived, cluster: Cluster) -> WorkerState:
        one, other = super().pick(phase, request, cluster), super().pick(phase, request, cluster)
        return min(one, other, key=lambda worker: _load(phase, worker))


class LeastLoaded(_PerPhase):
    """The worker that would finish its present work first.

    Work is counted in tokens in flight over what the device was measured to do: arithmetic for prefill, memory
    reads for decode.
    """

    def pick(self, phase: Phase, request: RequestArrived, cluster: Cluster) -> WorkerState:
        return cluster.best(phase, request.avoid)[0]


class CacheAware(LeastLoaded):
    """The worker that would finish its present work and what it lacks of this prompt first.

    As routers do that weigh cached prefixes against load, in tokens.
    """

    def pick(self, phase: Phase, request: RequestArrived, cluster: Cluster) -> WorkerState:
        holders = [worker for worker in cluster.holders(request, NUM_HOLDERS) if worker.takes(phase)]

        def tokens_ahead(worker: WorkerState) -> tuple[float, Rank]:
            lacking = request.num_prompt_tokens - cluster.cached_tokens(worker, request)
            return (worker.tokens_in_flight + lacking) / _rate(phase, worker), _load(phase, worker)

        return min([*cluster.best(phase, request.avoid), *holders], key=tokens_ahead)


POLICIES: dict[str, Callable[[PlacementOptions, CostModel], PlacementPolicy]] = {
    "cost": lambda options, costs: CostPlacement(costs, options.ttft_target_s, options.tpot_target_s),
    "cache_aware": lambda _options, _costs: CacheAware(),
    "least_loaded": lambda _options, _costs: LeastLoaded(),
    "power_of_two": lambda options, _costs: PowerOfTwo(options.seed),
    "random": lambda options, _costs: Random(options.seed),
    "round_robin": lambda _options, _costs: RoundRobin(),
}


def make_policy(options: PlacementOptions, costs: CostModel) -> PlacementPolicy:
    """
    Raises:
        ConfigError: there is no policy of that name; lists those there are.
    """
    if options.policy not in POLICIES:
        raise ConfigError(f"There is no placement policy {options.policy!r}; there are {', '.join(POLICIES)}.")
    return POLICIES[options.policy](options, costs)


def can_place(snapshot: ClusterSnapshot, options: PlacementOptions) -> bool:
    """Whether these workers are enough to place a request on, wherever that may be."""
    roles = {worker.info.role for worker in snapshot.workers if worker.duty.state is DutyState.ACTIVE}
    return all(any(role.takes(phase) for role in roles) for phase in make_policy(options, CostModel()).phases)


def _from(workers: Sequence[WorkerState], start: int, avoid: Collection[str]) -> int:
    """The position of the first worker from ``start`` on that is not to be avoided, or else of the first."""
    for position in range(start, start + len(avoid) + 1):
        if workers[position % len(workers)].info.worker_id not in avoid:
            return position % len(workers)
    return start % len(workers)
