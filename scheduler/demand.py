"""How much work arrives, per phase, and how fast workers could do it: what ``RolePlanner`` is asked with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scheduler.planner import Candidate, Demand, busyness
from scheduler.types import PoolLoad, WorkerRole
from scheduler.worker_state import CostPredictor, WorkerState
from scheduler.worker_table import WorkerTable

_POOLS = (WorkerRole.PREFILL, WorkerRole.DECODE)
MOST_ASKED = 64  # workers of a pool: each costs ten microseconds, and meanwhile no request is placed
MEMORY_S = 30.0  # arrivals count by exp(-age / MEMORY_S)
REFUSED_MEMORY_S = 5.0  # the same for those refused: a burst of them is forgotten before a pool grows for it
SATURATED = 0.7  # a pool that is less busy keeps nobody waiting
_LINE = 2.0  # prompts before one more: of a worker with a line; one may always be running
_NEARLY = 0.9  # as busy as another pool, as far as can be told
_FEW = 6.0  # requests that were placed: of fewer a single one that was refused says nothing
_FEWEST = 1e-3  # requests that count: a wait has an end also where none was placed


@dataclass(slots=True)
class _FadingSums:
    """Of requests and their tokens, each counted by exp(-age / memory_s)."""

    memory_s: float
    at_s: float = 0.0  # as of then are the sums
    requests: float = 0.0
    prompt: float = 0.0  # tokens, as below
    prefill: float = 0.0
    decode: float = 0.0

    def left(self, now: float) -> float:
        """How much of the sums counts now."""
        return math.exp((self.at_s - now) / self.memory_s)

    def add(self, prompt: float, prefill: float, decode: float, now: float) -> None:
        left = self.left(now)
        self.at_s = now
        self.requests = self.requests * left + 1
        self.prompt = self.prompt * left + prompt
        self.prefill = self.prefill * left + prefill
        self.decode = self.decode * left + decode


class DemandMeter:
    """Counts requests as they are placed or refused; sums fade. Low at first: what was before the first counts as
    nothing."""

    def __init__(self) -> None:
        self._placed = _FadingSums(MEMORY_S)
        self._refused = _FadingSums(REFUSED_MEMORY_S)

    def add(self, num_prompt_tokens: int, num_cached_tokens: int, num_output_tokens: int, now: float) -> None:
        """``num_output_tokens``: as many as are expected."""
        self._placed.add(num_prompt_tokens, num_prompt_tokens - num_cached_tokens, num_output_tokens, now)

    def demand(self, now: float, num_queued: int = 0) -> Demand:
        """Tokens per second. ``num_queued``: so many more came just now, each of the mean size."""
        placed = self._placed
        rate = (self._requests_at(now) + num_queued) / max(1, placed.requests) / MEMORY_S
        return Demand(placed.prefill * rate, placed.decode * rate)

    def refuse(self, num_prompt_tokens: int, num_output_tokens: int, now: float) -> None:
        """One that more workers would have kept. Caches would have had as much of its prompt as of those placed."""
        uncached = self._placed.prefill / self._placed.prompt if self._placed.prompt else 1.0
        self._refused.add(num_prompt_tokens, num_prompt_tokens * uncached, num_output_tokens, now)

    def refused_demand(self, now: float) -> Demand:
        """Tokens per second."""
        rate = self._refused.left(now) / REFUSED_MEMORY_S
        return Demand(self._refused.prefill * rate, self._refused.decode * rate)

    def refused_part(self, now: float) -> float:
        """Of the requests that came of late."""
        refused = self._refused.requests * self._refused.left(now) / REFUSED_MEMORY_S
        return refused / (refused + max(_FEW, self._requests_at(now)) / MEMORY_S)

    def wait_s(self, num_waiting: float, now: float) -> float:
        """Until so many that wait have been placed, at the pace of late."""
        return num_waiting * MEMORY_S / max(_FEWEST, self._requests_at(now))

    def sizes(self) -> tuple[int, int]:
        """Mean tokens of a prompt and of a sequence halfway through its answer; 1 at least."""
        placed = self._placed
        if not placed.requests:
            return 1, 1
        prompt = placed.prompt / placed.requests
        return max(1, round(prompt)), max(1, round(prompt + placed.decode / placed.requests / 2))

    def _requests_at(self, now: float) -> float:
        return self._placed.requests * self._placed.left(now)


def candidates(
    workers: WorkerTable, costs: CostPredictor, sizes: tuple[int, int], tpot_target_s: float
) -> list[Candidate]:
    """What the active workers of the two pools could do of requests of these sizes in either role.

    Of a large pool a part is asked, and each of it stands for several: its rates are those of all of them.
    """
    num_prompt_tokens, context_tokens = sizes
    found = []
    for role in _POOLS:
        asked = _asked(workers, role)
        for worker in asked:
            num_alike = len(workers.of_role(role)) / len(asked)
            prefill_s = costs.prefill_seconds(worker.worker_id, num_prompt_tokens)
            decode_tokens_s = decode_rate(worker, costs, context_tokens, tpot_target_s)
            rates = num_alike * num_prompt_tokens / prefill_s, num_alike * decode_tokens_s
            found.append(Candidate(worker.worker_id, role, *rates))
    return found


def _asked(workers: WorkerTable, role: WorkerRole) -> list[WorkerState]:
    """The same ones every time, as long as nobody comes or goes: what is said of them is compared over time."""
    return workers.of_role(role)[:MOST_ASKED]


def decode_rate(worker: WorkerState, costs: CostPredictor, context_tokens: int, tpot_target_s: float) -> float:
    """Tokens per second in the largest batch that keeps the target and that the worker has room for."""
    room = worker.max_tokens // context_tokens
    most = max(1, min(worker.info.max_num_seqs, room))
    best, size = 0.0, 1
    while size <= most:
        step_s = costs.decode_step_seconds(worker.worker_id, size, size * context_tokens)
        if best and step_s > tpot_target_s:
            break
        best = max(best, size / step_s)
        size *= 2
    return best


def pool_loads(
    workers: WorkerTable,
    able: Sequence[Candidate],
    costs: CostPredictor,
    meter: DemandMeter,
    num_queued: int,
    now: float,
) -> tuple[PoolLoad, ...]:
    """Of the two pools, as far as they have active workers.

    Args:
        able: the ``candidates`` for the meter's sizes.
        num_queued: interactive requests that wait before the workers; batch work waits for what is left over.
    """
    sizes, placed = meter.sizes(), meter.demand(now)
    asked_for, refused = meter.demand(now, num_queued) + meter.refused_demand(now), meter.refused_part(now)
    asked = {role: some for role in _POOLS if (some := _asked(workers, role))}
    latencies = {role: min(_latency(each, costs, sizes, now) for each in some) for role, some in asked.items()}
    num_ahead = min((_num_ahead(each, costs, sizes, now) for each in asked.get(WorkerRole.PREFILL, ())), default=0.0)
    scarce = _scarce({role: busyness(able, placed.of(role)) for role in asked}, num_ahead)
    loads = []
    for role, some in asked.items():
        num_workers = len(workers.of_role(role))
        num_waiting = float(num_queued if role in scarce else 0)
        if role is WorkerRole.DECODE:  # for room for their KV; prompts that wait for their turn are in the latency
            num_waiting += sum(each.load.waiting for each in some) * num_workers / len(some)
        busy, wait_s = busyness(able, asked_for.of(role)), meter.wait_s(num_waiting, now)
        refused_here = refused if role in scarce else 0.0
        loads.append(PoolLoad(role, num_workers, latencies[role], busy, wait_s, refused_here))
    return tuple(loads)


def _scarce(busy: Mapping[WorkerRole, float], num_ahead: float) -> set[WorkerRole]:
    """The pools that those in the queue wait for, and for want of which others are refused; at least one.

    Prefill workers where each has a line before it. Else by how busy each pool is with what was placed: the busier one,
    or both. But places are held while prompts are computed, too, so there may be too few of them where decode workers
    have little to do; prefill workers are what is waited for only if they are busy themselves.
    """
    prefill, decode = (busy.get(role, 0.0) for role in _POOLS)
    if num_ahead > _LINE:
        return {WorkerRole.PREFILL}
    if prefill < max(SATURATED, _NEARLY * decode):
        return {WorkerRole.DECODE}
    return set(_POOLS) if decode >= _NEARLY * prefill else {WorkerRole.PREFILL}


def _num_ahead(worker: WorkerState, costs: CostPredictor, sizes: tuple[int, int], now: float) -> float:
    """Prompts of the mean size before one more."""
    prefill_s = costs.prefill_seconds(worker.worker_id, sizes[0])
    return worker.backlog_s(now, prefill_s) / prefill_s


def _latency(worker: WorkerState, costs: CostPredictor, sizes: tuple[int, int], now: float) -> float:
    """Of one more request of the mean size."""
    num_prompt_tokens, context_tokens = sizes
    if worker.info.role is WorkerRole.PREFILL:
        prefill_s = costs.prefill_seconds(worker.worker_id, num_prompt_tokens)
        return worker.backlog_s(now, prefill_s) + prefill_s
    batch_size, context = worker.batch_size + 1, worker.batch_context_tokens + context_tokens
    return costs.decode_step_seconds(worker.worker_id, batch_size, context)
