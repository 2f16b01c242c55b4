"""Which worker does which phase of a request."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kvcache.errors import UnavailableError
from scheduler.types import Phase, Placement, WorkerAddress, WorkerRole, WorkerSnapshot


def place_least_loaded(
    request_id: str, workers: Iterable[WorkerSnapshot], avoid: Collection[str] = (), stay_on: str = ""
) -> Placement:
    """Puts each phase on the worker that would finish its present work first.

    Work is counted in tokens in flight over what the device was measured to do: arithmetic for prefill,
    memory reads for decode. A decode worker that also prefills does so in place, without a handoff.

    Args:
        avoid: ids of workers that this request has failed on already: taken only where there is no other.
        stay_on: id of the worker that decodes it, if it is alive.

    Raises:
        UnavailableError: no live worker takes one of the phases; names it.
    """
    workers = tuple(workers)
    known = [worker for worker in workers if worker.info.worker_id == stay_on]
    decode = known[0] if known else _least_loaded(Phase.DECODE, workers, avoid)
    if decode.info.role is WorkerRole.COLOCATED:
        return Placement(request_id, _address(decode), None)
    return Placement(request_id, _address(decode), _address(_least_loaded(Phase.PREFILL, workers, avoid)))


def _least_loaded(phase: Phase, workers: tuple[WorkerSnapshot, ...], avoid: Collection[str]) -> WorkerSnapshot:
    candidates = [worker for worker in workers if worker.info.role.takes(phase)]
    if not candidates:
        raise UnavailableError(f"No {phase.value} worker is available.")
    others = [worker for worker in candidates if worker.info.worker_id not in avoid]
    return min(others or candidates, key=lambda worker: _load_key(phase, worker))


def _load_key(phase: Phase, worker: WorkerSnapshot) -> tuple[float, int, int, str]:
    device = worker.info.device
    rate = device.gemm_gflop_s if phase is Phase.PREFILL else device.read_gb_s
    # Equal load, as in an idle cluster: the one that got fewer requests so far, so that work goes round.
    return (worker.tokens_in_flight / rate, worker.requests_in_flight, worker.requests_placed, worker.info.worker_id)


def _address(worker: WorkerSnapshot) -> WorkerAddress:
    return WorkerAddress(worker.info.worker_id, worker.info.address)
