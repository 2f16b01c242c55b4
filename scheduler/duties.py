"""What each worker is to do: drains, and roles that change, without losing a request.

    ACTIVE ──drain, change of role──► DRAINING ──nothing runs, all KV delivered──► DRAINED, or ACTIVE in the new role
      ▲                                  │                                            │
      └──────────────activate────────────┴────────────────────activate────────────────┘

A worker that is not active gets no new request of either phase; what was placed on it before ends there, or goes on
elsewhere when the drain has a limit (``Duty.move_after_s``), which the worker itself keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.events import Command, RefuseDuty, TakeDuty
from scheduler.types import ACTIVE, Duty, DutyState, Phase, WorkerRole
from scheduler.worker_state import WorkerState
from scheduler.worker_table import WorkerTable

TRANSITIONS = {
    DutyState.ACTIVE: {DutyState.DRAINING},
    DutyState.DRAINING: {DutyState.DRAINING, DutyState.DRAINED, DutyState.ACTIVE},
    DutyState.DRAINED: {DutyState.ACTIVE, DutyState.DRAINING},
}


@dataclass(slots=True)
class DutyBook:
    """Changes the duties of the workers in a table.

    A worker learns of its duty in the answer to each of its heartbeats, from the first change on: so an answer that is
    lost is repeated. To a scheduler that was restarted it says what it was told last.
    """

    workers: WorkerTable
    move_after_s: float | None = None  # of drains that say nothing else
    _told: set[str] = field(default_factory=set)  # ids of workers whose duty has changed since they registered

    def drain(self, worker_id: str, *, force: bool, move_after_s: float | None = None) -> list[Command]:
        """Refused, unless forced, where nobody else takes a phase of the worker's."""
        worker = self.workers.get(worker_id)
        problem = self._problem(worker_id, worker, leaves_role=not force)
        if worker is None or problem is not None:
            return [RefuseDuty(worker_id, problem or "")]
        if worker.duty.state is not DutyState.DRAINED:
            self._assign(worker, self._draining(worker, move_after_s))
        return []

    def activate(self, worker_id: str) -> list[Command]:
        worker = self.workers.get(worker_id)
        if worker is None:
            return [RefuseDuty(worker_id, _unknown(worker_id))]
        if worker.duty != ACTIVE:
            self._assign(worker, ACTIVE)
        return []

    def change_role(self, worker_id: str, role: WorkerRole, move_after_s: float | None = None) -> list[Command]:
        worker = self.workers.get(worker_id)
        problem = self._problem(worker_id, worker, leaves_role=worker is not None and worker.info.role is not role)
        if worker is None or problem is not None:
            return [RefuseDuty(worker_id, problem or "")]
        if WorkerRole.COLOCATED in (worker.info.role, role):
            message = f"{worker_id} is {worker.info.role.value}: only the two pools exchange roles"
            return [RefuseDuty(worker_id, message)]
        if worker.info.role is role:
            return self.activate(worker_id)
        self._assign(worker, self._draining(worker, move_after_s, role))
        return []

    def enter(self, worker_id: str) -> None:
        """A worker registers. What was told to an earlier process of it is void."""
        self._told.discard(worker_id)

    def heard(self, worker: WorkerState) -> list[Command]:
        """A heartbeat has come and is booked: goes on with what is under way, and says what the worker shall know."""
        if worker.duty.state is DutyState.DRAINING and _is_empty(worker):
            if worker.duty.next_role is None:
                self._assign(worker, Duty(DutyState.DRAINED))
            else:
                self._assign(worker, ACTIVE, worker.duty.next_role)
        if worker.worker_id not in self._told:
            return []
        return [TakeDuty(worker.worker_id, worker.info.role, worker.duty)]

    @property
    def is_changing(self) -> bool:
        """Whether a worker is on its way to another role."""
        return self.workers.num_changing > 0

    def _draining(self, worker: WorkerState, move_after_s: float | None, next_role: WorkerRole | None = None) -> Duty:
        """Nothing is moved where nobody would take it: it ends where it is, however long that takes."""
        limit_s = move_after_s if move_after_s is not None else self.move_after_s
        is_last = any(worker.role.takes(phase) and not self._has_others(worker, phase) for phase in Phase)
        return Duty(DutyState.DRAINING, next_role, None if is_last else limit_s)

    def _problem(self, worker_id: str, worker: WorkerState | None, *, leaves_role: bool) -> str | None:
        if worker is None:
            return _unknown(worker_id)
        if not leaves_role:
            return None
        for phase in Phase:
            if worker.takes(phase) and not self._has_others(worker, phase):
                return f"{worker_id} is the only active worker for {phase.value}"
        return None

    def _has_others(self, worker: WorkerState, phase: Phase) -> bool:
        return any(each is not worker for each in self.workers.taking(phase))

    def _assign(self, worker: WorkerState, duty: Duty, role: WorkerRole | None = None) -> None:
        assert duty.state in TRANSITIONS[worker.duty.state], f"{worker.duty.state} to {duty.state}"
        self.workers.remove(worker)
        worker.assign(duty, role or worker.role)
        self.workers.add(worker)
        self._told.add(worker.worker_id)


def _is_empty(worker: WorkerState) -> bool:
    """By the books and by its own count, which tells of requests that a restarted scheduler does not know."""
    load = worker.load
    return not (worker.requests_in_flight or load.running or load.waiting or load.blocks_leased)


def _unknown(worker_id: str) -> str:
    return f"there is no worker {worker_id}"
