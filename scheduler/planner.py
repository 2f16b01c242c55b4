"""Which workers prefill and which decode: the split under which the busier of the two phases is least busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.types import WorkerRole

MIN_GAIN = 0.15  # part by which the busier phase must get less busy: a flip costs a drain and a cold prefix cache
HOLD_S = 10.0  # for so long without a break
MIN_STAY_S = 60.0  # a worker keeps a role at least as long
MIN_BUSYNESS = 0.3  # below it nobody waits long enough for a flip to pay


@dataclass(frozen=True, slots=True)
class Demand:
    """Work that arrives, in tokens per second: prompt tokens that no cache has, and tokens to generate."""

    prefill_tokens_s: float
    decode_tokens_s: float

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.prefill_tokens_s + other.prefill_tokens_s, self.decode_tokens_s + other.decode_tokens_s)

    def of(self, role: WorkerRole) -> Demand:
        """The part that workers of one role have to do."""
        is_prefill = role is WorkerRole.PREFILL
        return Demand(self.prefill_tokens_s if is_prefill else 0.0, 0.0 if is_prefill else self.decode_tokens_s)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that may change its role, with what the cost model says it can do, in tokens per second.

    In a large pool it stands for others like it, and the rates are those of all of them.
    """

    worker_id: str
    role: WorkerRole  # PREFILL or DECODE
    prefill_tokens_s: float
    decode_tokens_s: float


@dataclass(frozen=True, slots=True)
class Flip:
    worker_id: str
    role: WorkerRole  # the one it shall take


def busyness(workers: Sequence[Candidate], demand: Demand) -> float:
    """How busy the busier phase is: 1 means that work comes as fast as it can be done."""
    return _busier(demand, *_rates(workers))


def best_split(workers: Sequence[Candidate], demand: Demand) -> dict[str, WorkerRole]:
    """The role of each worker under the split with the least bottleneck; at least one of each role.

    Work of two kinds that can be divided is best shared out along the workers' comparative advantage: ordered by how
    much better they prefill than decode, the first k prefill (Ricardo's argument; for two kinds the optimum is such a
    cut). All cuts are tried. Of equal ones the one that changes the fewest roles is taken.
    """
    if len(workers) < 2:
        return {worker.worker_id: worker.role for worker in workers}
    ordered = sorted(workers, key=lambda each: (-each.prefill_tokens_s / each.decode_tokens_s, _rank(each)))
    prefill, decode = 0.0, sum(worker.decode_tokens_s for worker in ordered)
    num_changes = sum(worker.role is WorkerRole.PREFILL for worker in ordered)
    best_cut, best = 0, (float("inf"), 0)
    for cut, worker in enumerate(ordered[:-1], start=1):
        prefill += worker.prefill_tokens_s
        decode -= worker.decode_tokens_s
        num_changes += -1 if worker.role is WorkerRole.PREFILL else 1
        found = (_busier(demand, prefill, decode), num_changes)
        if found < best:
            best_cut, best = cut, found
    return {worker.worker_id: _role_of(index, best_cut) for index, worker in enumerate(ordered)}


@dataclass(slots=True)
class RolePlanner:
    """Lets roles follow the load, with hysteresis: one worker at a time, for a clear gain that lasted."""

    _gain_since_s: float | None = None
    _changed_at_s: dict[str, float] = field(default_factory=dict)

    def decide(self, workers: Sequence[Candidate], demand: Demand, now: float) -> Flip | None:
        """The worker to flip now. Called every few seconds, and not while another is on its way.

        Args:
            workers: those that are active; of those that joined since the last call the stay begins now.
        """
        for worker in workers:
            self._changed_at_s.setdefault(worker.worker_id, now)
        flip = self._best_flip(workers, demand, now)
        if flip is None:
            self._gain_since_s = None
            return None
        if self._gain_since_s is None:
            self._gain_since_s = now
        if now - self._gain_since_s < HOLD_S:
            return None
        self._gain_since_s = None
        self._changed_at_s[flip.worker_id] = now
        return flip

    def _best_flip(self, workers: Sequence[Candidate], demand: Demand, now: float) -> Flip | None:
        """The one step towards the best split that helps most."""
        prefill, decode = _rates(workers)
        present = _busier(demand, prefill, decode)
        if present < MIN_BUSYNESS:
            return None
        split = best_split(workers, demand)
        able = [
            (_busier(demand, *_rates_after(worker, prefill, decode)), worker.worker_id)
            for worker in workers
            if split[worker.worker_id] is not worker.role and now - self._changed_at_s[worker.worker_id] >= MIN_STAY_S
        ]
        if not able:
            return None
        least, worker_id = min(able)
        return Flip(worker_id, split[worker_id]) if least <= present * (1 - MIN_GAIN) else None


def _rates(workers: Sequence[Candidate]) -> tuple[float, float]:
    """Tokens per second of all that prefill and of all that decode."""
    prefill = sum(worker.prefill_tokens_s for worker in workers if worker.role is WorkerRole.PREFILL)
    decode = sum(worker.decode_tokens_s for worker in workers if worker.role is WorkerRole.DECODE)
    return prefill, decode


def _rates_after(worker: Candidate, prefill: float, decode: float) -> tuple[float, float]:
    """The same once a worker has changed its role."""
    if worker.role is WorkerRole.PREFILL:
        return prefill - worker.prefill_tokens_s, decode + worker.decode_tokens_s
    return prefill + worker.prefill_tokens_s, decode - worker.decode_tokens_s


def _busier(demand: Demand, prefill: float, decode: float) -> float:
    return max(_part(demand.prefill_tokens_s, prefill), _part(demand.decode_tokens_s, decode))


def _part(demand: float, rate: float) -> float:
    if demand <= 0:
        return 0.0
    return demand / rate if rate > 0 else float("inf")


def _rank(worker: Candidate) -> tuple[bool, str]:
    """Among equals those that prefill already come first."""
    return worker.role is not WorkerRole.PREFILL, worker.worker_id


def _role_of(index: int, cut: int) -> WorkerRole:
    return WorkerRole.PREFILL if index < cut else WorkerRole.DECODE
