"""`twinpool drain`, `undrain`, `role` and `scale`: they tell a running server, and wait until it is so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

import orjson
from rich.console import Console

from engine.cluster_view import parse_cluster, status_table
from engine.http_call import base_url, call_server
from kvcache.errors import TwinpoolError
from scheduler.types import ClusterSnapshot, DutyState, WorkerRole, WorkerSnapshot

POLL_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """Which server, and how long to wait. ``timeout_s`` of 0 does not wait."""

    url: str
    key: str | None
    timeout_s: float


def drain(target: Target, worker_id: str, *, force: bool, move_after_s: float | None = None) -> None:
    """Returns when nothing runs on the worker and its KV is delivered.

    Args:
        move_after_s: what still decodes there after so long goes on elsewhere; None: as the server was told.

    Raises:
        TwinpoolError: refused, or not in time, or the worker was lost meanwhile.
    """
    _tell(target, f"workers/{quote(worker_id, safe='')}/drain", {"force": force, "move_after_s": move_after_s})
    _wait(target, lambda cluster: _drain_progress(cluster, worker_id))


def undrain(target: Target, worker_id: str) -> None:
    """The worker takes requests again."""
    _tell(target, f"workers/{quote(worker_id, safe='')}/activate", {})
    Console().print(f"{worker_id} takes requests again")


def change_role(target: Target, worker_id: str, role: WorkerRole, move_after_s: float | None) -> None:
    """Returns when the worker has the role. ``move_after_s`` as of ``drain``.

    Raises:
        TwinpoolError: as ``drain``.
    """
    _tell(target, f"workers/{quote(worker_id, safe='')}/role", {"role": role.value, "move_after_s": move_after_s})
    _wait(target, lambda cluster: _role_progress(cluster, worker_id, role))


def scale(target: Target, counts: dict[WorkerRole, int]) -> None:
    """Returns when as many workers of each role given are at work, and the others have gone.

    Raises:
        TwinpoolError: refused, or not in time.
    """
    _tell(target, "scale", {role.value: count for role, count in counts.items()})
    _wait(target, lambda cluster: _scale_progress(cluster, counts))


@dataclass(frozen=True, slots=True)
class _Progress:
    message: str
    is_done: bool = False


def _tell(target: Target, path: str, body: dict[str, object]) -> None:
    call_server(f"{base_url(target.url)}/admin/{path}", target.key, orjson.dumps(body))


def _wait(target: Target, look: Callable[[ClusterSnapshot], _Progress]) -> None:
    """One moving line on a terminal, a line for each change elsewhere; the table of workers at the end."""
    console = Console()
    if target.timeout_s == 0:
        return
    deadline = time.monotonic() + target.timeout_s
    told = ""
    with console.status("") as line:
        while True:
            cluster = _cluster(target)
            progress = look(cluster)
            if progress.message != told:
                told = progress.message
                line.update(told)
                if not console.is_terminal:
                    console.print(told)
            if progress.is_done:
                break
            if time.monotonic() > deadline:
                raise TwinpoolError(f"Not done after {target.timeout_s:g} s: {told}. It goes on without this command.")
            time.sleep(POLL_INTERVAL_S)
    if console.is_terminal:
        console.print(told)
        console.print(status_table(cluster))


def _cluster(target: Target) -> ClusterSnapshot:
    return parse_cluster(call_server(f"{base_url(target.url)}/admin/cluster", target.key), target.url)


def _drain_progress(cluster: ClusterSnapshot, worker_id: str) -> _Progress:
    worker = _find(cluster, worker_id)
    if worker.duty.state is DutyState.DRAINED:
        return _Progress(f"{worker_id} is drained", is_done=True)
    if worker.duty.state is DutyState.ACTIVE:
        return _Progress(f"{worker_id}: waiting for the scheduler")
    return _Progress(f"{worker_id}: {_left(worker)}")


def _role_progress(cluster: ClusterSnapshot, worker_id: str, role: WorkerRole) -> _Progress:
    worker = _find(cluster, worker_id)
    if worker.info.role is role and worker.duty.state is DutyState.ACTIVE:
        return _Progress(f"{worker_id} is a {role.value} worker", is_done=True)
    return _Progress(f"{worker_id}: {_left(worker)}")


def _scale_progress(cluster: ClusterSnapshot, counts: dict[WorkerRole, int]) -> _Progress:
    active = {
        role: sum(worker.info.role is role and worker.duty.state is DutyState.ACTIVE for worker in cluster.workers)
        for role in counts
    }
    leaving = [worker for worker in cluster.workers if worker.duty.state is not DutyState.ACTIVE]
    parts = [f"{role.value} {active[role]} of {count}" for role, count in counts.items()]
    parts += [f"{worker.info.worker_id}: {_left(worker)}" for worker in leaving]
    parts += [f"{worker_id} starts" for worker_id in cluster.missing]
    is_done = active == counts and not any(worker.info.role in counts for worker in leaving) and not cluster.missing
    return _Progress(", ".join(parts), is_done)


def _left(worker: WorkerSnapshot) -> str:
    requests = max(worker.requests_in_flight, worker.load.running + worker.load.waiting)
    blocks = f", {worker.load.blocks_leased} KV blocks in handoffs" if worker.load.blocks_leased else ""
    return f"{requests} requests left{blocks}" if requests or blocks else "ends"


def _find(cluster: ClusterSnapshot, worker_id: str) -> WorkerSnapshot:
    for worker in cluster.workers:
        if worker.info.worker_id == worker_id:
            return worker
    raise TwinpoolError(f"{worker_id} is not there: it was lost, or has left.")
