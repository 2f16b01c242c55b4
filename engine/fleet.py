"""The worker processes of a cluster: so many as were asked for are kept running.

A worker that has ended is started again, later each time it crashes; where no node has room it waits until one has.
So a node that leaves loses its workers to others, and a node that joins gets those that wait.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from engine.autoscaling import Autoscaling
from kvcache.errors import RequestError, TwinpoolError, UnavailableError
from scheduler.backoff import RestartBackoff
from scheduler.events import DrainWorker, Event, WorkerLeft, WorkersExpected
from scheduler.types import ClusterSnapshot, DutyState, WorkerInfo, WorkerRole
from workers.load_progress import LoadProgress
from workers.worker_options import WorkerOptions

POLL_INTERVAL_S = 0.2
JOIN_TIMEOUT_S = 120.0  # to measure and to register: the others wait; a scheduler that restarts is back much sooner
NOT_LOADED = LoadProgress()
logger = logging.getLogger(__name__)


class WorkerProcess(Protocol):
    """What ``workers.ray_worker.RayWorker`` offers, which says what each does."""

    def progress(self) -> LoadProgress | None: ...

    def join(self) -> WorkerInfo | None: ...

    def has_ended(self) -> bool: ...

    def has_room(self) -> bool: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class FleetScheduler(Protocol):
    """What ``scheduler.ray_actor.PolledScheduler`` offers."""

    def tell(self, *events: Event) -> None: ...

    def poll(self) -> ClusterSnapshot | None: ...


@dataclass(slots=True, eq=False)
class Member:
    """One worker over all its processes."""

    options: WorkerOptions
    process: WorkerProcess | None = None
    progress: LoadProgress = NOT_LOADED
    info: WorkerInfo | None = None  # of the process that runs, once it has registered
    failure: TwinpoolError | None = None  # why the last process ended
    num_starts: int = 0
    start_at_s: float = 0.0
    join_by_s: float = math.inf  # once it has begun to
    registered_at_s: float = 0.0
    is_leaving: bool = False  # it drains, then ends, then is forgotten
    has_been_stopped: bool = False
    backoff: RestartBackoff = field(default_factory=RestartBackoff)

    @property
    def worker_id(self) -> str:
        return self.options.worker_id

    @property
    def is_coming(self) -> bool:
        """It starts for the first time, or waits for a node to do so."""
        return self.info is None and self.num_starts <= 1 and self.start_at_s == 0.0


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """What a launcher has started; ends with it."""

    scheduler: Any  # its actor's handle
    fleet: Fleet


class Fleet:
    """Starts, watches and ends workers, so many as ``scale`` was told last. Any thread may call.

    Args:
        workers: those to begin with; what more workers of a role are like, its first one shows.
        start_worker: starts a process of a worker, the n-th.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        workers: Sequence[WorkerOptions],
        start_worker: Callable[[WorkerOptions, int], WorkerProcess],
        scheduler: FleetScheduler,
        clock: Callable[[], float] = time.monotonic,
        autoscaling: Autoscaling | None = None,
    ) -> None:
        self.members = {options.worker_id: Member(options) for options in workers}
        self._models = {options.role: options for options in reversed(workers)}
        self._cluster = ClusterSnapshot()  # the newest view
        self._has_begun = False  # all workers have run at once
        self._told_epoch: int | None = None  # of the scheduler that knows which workers there shall be
        self._lock = threading.Lock()
        self._joining = True
        self._start_worker = start_worker
        self._scheduler = scheduler
        self._clock = clock
        self._autoscaling = autoscaling
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self, *, joining: bool = True) -> None:
        """Looks at every worker once, and does what is due.

        One worker registers at a time, and none without ``joining``: each measures its device, which several may share,
        and on which others may still load.
        """
        with self._lock:
            self._look()
            self._joining = joining
            for member in list(self.members.values()):
                try:
                    self._advance(member)
                except TwinpoolError as error:
                    self._lose(member, error)
                except Exception as error:  # one worker's boundary: the others are looked after in any case
                    logger.exception("Looking after %s failed unexpectedly.", member.worker_id)
                    self._lose(member, TwinpoolError(f"{type(error).__name__}: {error}"))

    def scale(self, counts: Mapping[WorkerRole, int]) -> None:
        """From now on there shall be so many workers of each role given; those too many drain first.

        Raises:
            RequestError: the cluster could not serve so, or has no workers of a role that more could be like.
        """
        with self._lock:
            self._check_counts(counts)
            self._set_counts(counts)

    def num_workers(self, role: WorkerRole) -> int:
        """That there shall be."""
        with self._lock:
            return len(self._of_role(role))

    @property
    def is_loaded(self) -> bool:
        return all(member.progress.is_ready for member in self.members.values())

    @property
    def is_complete(self) -> bool:
        return all(member.info is not None for member in self.members.values())

    def start_thread(self) -> None:
        """Goes on looking until ``close``."""
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Tells all workers to stop; those that have not after ``timeout_s`` are killed."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if self._autoscaling is not None:
            self._autoscaling.close()
        processes = [member.process for member in self.members.values() if member.process is not None]
        for process in processes:
            process.stop()
        deadline = self._clock() + timeout_s
        while self._clock() < deadline and not all(process.has_ended() for process in processes):
            time.sleep(POLL_INTERVAL_S / 4)
        for process in processes:
            _close(process)

    def _run(self) -> None:
        while not self._closing.wait(POLL_INTERVAL_S):
            try:
                self.step()
            except Exception:  # the thread's top, which must go on
                logger.exception("Looking after the workers failed.")

    def _set_counts(self, counts: Mapping[WorkerRole, int]) -> None:
        for role, count in counts.items():
            present = self._of_role(role)
            for _ in range(count - len(present)):
                self._add(role)
            for member in sorted(present, key=self._dispensability)[: max(0, len(present) - count)]:
                member.is_leaving = True
        self._told_epoch = None

    def _autoscale(self, autoscaling: Autoscaling, cluster: ClusterSnapshot) -> None:
        """Also while workers wait for a node or crash again and again: others are not to suffer for them."""
        pools = {role: self._of_role(role) for role in WorkerRole}
        counts = {role: len(pool) for role, pool in pools.items()}
        coming = {role: sum(member.is_coming for member in pool) for role, pool in pools.items()}
        changes = autoscaling.decide(cluster, counts, coming, self._clock())
        if changes:
            self._set_counts(changes)

    def _request_nodes(self, autoscaling: Autoscaling) -> None:
        """Again and again, whatever state workers and scheduler are in: who is silent is taken to need nothing."""
        rooms = [member.options.room for member in self.members.values() if not member.is_leaving]
        autoscaling.request(rooms, self._clock())

    def _check_counts(self, counts: Mapping[WorkerRole, int]) -> None:
        wanted = {role: counts.get(role, len(self._of_role(role))) for role in WorkerRole}
        prefill, decode = wanted[WorkerRole.PREFILL], wanted[WorkerRole.DECODE]
        if bool(prefill) != bool(decode) or not sum(wanted.values()):
            raise RequestError(
                f"with {prefill} prefill, {decode} decode and {wanted[WorkerRole.COLOCATED]} colocated workers not"
                " every phase would have one; two pools need at least one of each"
            )
        for role, count in wanted.items():
            if count and role not in self._models:
                raise RequestError(f"the server was started without {role.value} workers, and knows of none to start")

    def _of_role(self, role: WorkerRole) -> list[Member]:
        return [member for member in self.members.values() if member.options.role is role and not member.is_leaving]

    def _add(self, role: WorkerRole) -> None:
        names = (f"{role.value}-{number}" for number in itertools.count())
        worker_id = next(name for name in names if name not in self.members)
        self.members[worker_id] = Member(replace(self._models[role], worker_id=worker_id))

    def _dispensability(self, member: Member) -> tuple[bool, int, int]:
        """First those that do not serve yet, then those with the least to do, then the newest."""
        found = [each for each in self._cluster.workers if each.info.worker_id == member.worker_id]
        in_flight = found[0].requests_in_flight if found else 0
        return member.info is not None, in_flight, -list(self.members).index(member.worker_id)

    def _look(self) -> None:
        """Learns what the scheduler knows, if there is news, and asks for the nodes that the workers need."""
        cluster = self._scheduler.poll()
        if cluster is not None:
            self._learn(cluster)
        if self._autoscaling is not None and self._has_begun:
            self._request_nodes(self._autoscaling)

    def _learn(self, cluster: ClusterSnapshot) -> None:
        """A scheduler that does not know which workers there shall be is told."""
        self._cluster = cluster
        for worker in cluster.workers:
            member = self.members.get(worker.info.worker_id)
            if member is not None and member.options.role is not worker.info.role:
                member.options = replace(member.options, role=worker.info.role)  # also of its next process
        if self._told_epoch != cluster.epoch:
            self._told_epoch = cluster.epoch
            self._scheduler.tell(WorkersExpected(tuple(self.members)))
        self._has_begun |= self.is_complete
        if self._autoscaling is not None and self._has_begun:
            self._autoscale(self._autoscaling, cluster)

    def _advance(self, member: Member) -> None:
        if member.is_leaving:
            self._dismiss(member)
        elif member.process is None:
            if self._clock() >= member.start_at_s:
                self._start(member)
        elif member.process.has_ended():
            self._lose(member, member.failure)
        elif not member.progress.is_ready:
            member.progress = member.process.progress() or member.progress
        elif member.info is None and self._joining and self._may_join(member):
            self._join(member, member.process)

    def _dismiss(self, member: Member) -> None:
        """Drains a worker, then ends its process. The order is repeated until the scheduler shows that it was heard."""
        process = member.process
        if process is None or member.info is None or process.has_ended():
            if process is not None:
                _close(process)
            del self.members[member.worker_id]
            self._told_epoch = None
            logger.info("%s has left", member.worker_id)
            return
        states = [each.duty.state for each in self._cluster.workers if each.info.worker_id == member.worker_id]
        if states == [DutyState.ACTIVE]:
            self._scheduler.tell(DrainWorker(member.worker_id, force=True))
        elif states == [DutyState.DRAINED] and not member.has_been_stopped:
            member.has_been_stopped = True
            process.stop()

    def _start(self, member: Member) -> None:
        member.num_starts += 1
        member.join_by_s = math.inf
        member.process = self._start_worker(member.options, member.num_starts)
        member.progress = NOT_LOADED
        member.info = None

    def _may_join(self, member: Member) -> bool:
        """Whether it is measuring already, or nobody else is and it is the first in line."""
        ready = (each for each in self.members.values() if each.info is None and each.progress.is_ready)
        return min(ready, key=lambda each: each.join_by_s) is member

    def _join(self, member: Member, process: WorkerProcess) -> None:
        now = self._clock()
        member.join_by_s = min(member.join_by_s, now + JOIN_TIMEOUT_S)
        info = process.join()
        if info is not None:
            member.info = info
            member.failure = None
            member.registered_at_s = now
            if member.num_starts > 1:
                logger.info("%s is back after %d restarts", member.worker_id, member.num_starts - 1)
        elif now >= member.join_by_s:
            raise UnavailableError(f"it has not registered within {JOIN_TIMEOUT_S:g} s")

    def _lose(self, member: Member, error: TwinpoolError | None) -> None:
        """Its process has ended, is of no use, or could not be started."""
        now = self._clock()
        process, info = member.process, member.info
        delay_s = member.backoff.delay_after(now - member.registered_at_s if info is not None else 0.0)
        member.process, member.info, member.progress = None, None, NOT_LOADED
        member.failure = error
        member.start_at_s = now + delay_s
        logger.warning("%s has ended%s; it starts again in %g s", member.worker_id, _reason(error), delay_s)
        if process is not None:
            _close(process)
        if info is not None:  # sooner than its heartbeats are missed
            self._scheduler.tell(WorkerLeft(member.worker_id, info.incarnation))


def _close(process: WorkerProcess) -> None:
    """Whatever comes of it: nobody needs it any more, and others wait."""
    try:
        process.close()
    except Exception:  # its own boundary
        logger.exception("The process of a worker could not be closed.")


def _reason(error: TwinpoolError | None) -> str:
    return f" ({error})" if error is not None else ""
