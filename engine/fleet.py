"""The worker processes of a cluster: so many as were asked for are kept running.

A worker that has ended is started again, later each time it crashes; where no node has room it waits until one has.
So a node that leaves loses its workers to others, and a node that joins gets those that wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvcache.errors import TwinpoolError
from scheduler.backoff import RestartBackoff
from scheduler.events import Event, WorkerLeft
from scheduler.types import ClusterSnapshot, WorkerInfo
from workers.load_progress import LoadProgress
from workers.worker_options import WorkerOptions

POLL_INTERVAL_S = 0.2
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
    registered_at_s: float = 0.0
    backoff: RestartBackoff = field(default_factory=RestartBackoff)

    @property
    def worker_id(self) -> str:
        return self.options.worker_id


class Fleet:
    """Starts, watches and ends workers. All but ``start_thread`` and ``close`` is called by one thread at a time.

    Args:
        start_worker: starts a process of a worker, the n-th.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        workers: Sequence[WorkerOptions],
        start_worker: Callable[[WorkerOptions, int], WorkerProcess],
        scheduler: FleetScheduler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.members = {options.worker_id: Member(options) for options in workers}
        self._start_worker = start_worker
        self._scheduler = scheduler
        self._clock = clock
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self) -> None:
        """Looks at every worker once, and does what is due. One worker registers at a time: each measures its device,
        which several may share."""
        for member in self.members.values():
            try:
                self._advance(member)
            except TwinpoolError as error:
                self._lose(member, error)

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
        processes = [member.process for member in self.members.values() if member.process is not None]
        for process in processes:
            process.stop()
        deadline = self._clock() + timeout_s
        while self._clock() < deadline and not all(process.has_ended() for process in processes):
            time.sleep(POLL_INTERVAL_S / 4)
        for process in processes:
            process.close()

    def _run(self) -> None:
        while not self._closing.wait(POLL_INTERVAL_S):
            try:
                self.step()
            except Exception:  # the thread's top, which must go on
                logger.exception("Looking after the workers failed.")

    def _advance(self, member: Member) -> None:
        if member.process is None:
            if self._clock() >= member.start_at_s:
                self._start(member)
        elif member.process.has_ended():
            self._lose(member, member.failure)
        elif not member.progress.is_ready:
            member.progress = member.process.progress() or member.progress
        elif member.info is None and self._may_join(member):
            self._join(member, member.process)

    def _start(self, member: Member) -> None:
        member.num_starts += 1
        member.process = self._start_worker(member.options, member.num_starts)
        member.progress = NOT_LOADED
        member.info = None

    def _may_join(self, member: Member) -> bool:
        """Whether nobody before it in line is measuring."""
        ready = (each for each in self.members.values() if each.info is None and each.progress.is_ready)
        return next(ready) is member

    def _join(self, member: Member, process: WorkerProcess) -> None:
        info = process.join()
        if info is not None:
            member.info = info
            member.failure = None
            member.registered_at_s = self._clock()
            if member.num_starts > 1:
                logger.info("%s is back after %d restarts", member.worker_id, member.num_starts - 1)

    def _lose(self, member: Member, error: TwinpoolError | None) -> None:
        """Its process has ended, or is of no use."""
        now = self._clock()
        assert member.process is not None, "only a process that was started is lost"
        member.process.close()
        healthy_s = now - member.registered_at_s if member.info is not None else 0.0
        delay_s = member.backoff.delay_after(healthy_s)
        if member.info is not None:  # sooner than its heartbeats are missed
            self._scheduler.tell(WorkerLeft(member.worker_id, member.info.incarnation))
        logger.warning("%s has ended%s; it starts again in %g s", member.worker_id, _reason(error), delay_s)
        member.process, member.info, member.progress = None, None, NOT_LOADED
        member.failure = error
        member.start_at_s = now + delay_s


def _reason(error: TwinpoolError | None) -> str:
    return f" ({error})" if error is not None else ""
