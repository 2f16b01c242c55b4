"""How much work arrives, per phase, and how fast workers could do it: what ``RolePlanner`` is asked with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scheduler.planner import Candidate, Demand, busyness
from scheduler.types import PoolLoad, WorkerRole
from scheduler.worker_state import CostPredictor, WorkerState
from scheduler.worker_table import WorkerTable

_POOLS = (WorkerRole.PREFILL, WorkerRole.DECODE)
MOST_ASKED = 64  # workers of a pool: each costs ten microseconds, and meanwhile no request is placed
MEMORY_S = 30.0  # arrivals count by exp(-age / MEMORY_S)


class DemandMeter:
    """Counts requests as they are placed; sums fade. Low at first: what was before the first counts as nothing."""

    def __init__(self) -> None:
        self._at_s = 0.0  # as of then are the sums
        self._requests = 0.0
        self._prompt = 0.0  # tokens, as below
        self._prefill = 0.0
        self._decode = 0.0

    def add(self, num_prompt_tokens: int, num_cached_tokens: int, num_output_tokens: int, now: float) -> None:
        """``num_output_tokens``: as many as are expected."""
        fading = math.exp((self._at_s - now) / MEMORY_S)
        self._at_s = now
        self._requests = self._requests * fading + 1
        self._prompt = self._prompt * fading + num_prompt_tokens
        self._prefill = self._prefill * fading + num_prompt_tokens - num_cached_tokens
        self._decode = self._decode * fading + num_output_tokens

    def demand(self, now: float) -> Demand:
        """Tokens per second."""
        rate = math.exp((self._at_s - now) / MEMORY_S) / MEMORY_S
        return Demand(self._prefill * rate, self._decode * rate)

    def sizes(self) -> tuple[int, int]:
        """Mean tokens of a prompt and of a sequence halfway through its answer; 1 at least."""
        if not self._requests:
            return 1, 1
        prompt = self._prompt / self._requests
        return max(1, round(prompt)), max(1, round(prompt + self._decode / self._requests / 2))


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
    active = workers.of_role(role)
    return active[:: -(-len(active) // MOST_ASKED) or 1]


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
    workers: WorkerTable, able: Sequence[Candidate], costs: CostPredictor, meter: DemandMeter, now: float
) -> tuple[PoolLoad, ...]:
    """Of the two pools, as far as they have active workers.

    Args:
        able: the ``candidates`` for the meter's sizes.
    """
    sizes, demand = meter.sizes(), meter.demand(now)
    loads = []
    for role in _POOLS:
        asked = _asked(workers, role)
        if asked:
            latency_s = min(_latency(each, costs, sizes, now) for each in asked)
            busy = busyness(able, demand.of(role))
            loads.append(PoolLoad(role, len(workers.of_role(role)), latency_s, busy))
    return tuple(loads)


def _latency(worker: WorkerState, costs: CostPredictor, sizes: tuple[int, int], now: float) -> float:
    """Of one more request of the mean size."""
    num_prompt_tokens, context_tokens = sizes
    if worker.info.role is WorkerRole.PREFILL:
        prefill_s = costs.prefill_seconds(worker.worker_id, num_prompt_tokens)
        return worker.backlog_s(now, prefill_s) + prefill_s
    batch_size, context = worker.batch_size + 1, worker.batch_context_tokens + context_tokens
    return costs.decode_step_seconds(worker.worker_id, batch_size, context)
