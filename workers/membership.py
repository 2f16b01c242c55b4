"""A worker's place in its cluster: registers, reports, does what the scheduler says, and leaves."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from kvcache.errors import ConfigError, UnavailableError
from scheduler.events import (
    AskForCache,
    AskToRegister,
    BeatEvery,
    Command,
    DrainWorker,
    Event,
    RefuseWorker,
    TakeDuty,
    WorkerLeft,
    WorkerRegistered,
)
from scheduler.types import ACTIVE, Duty, DutyState, WorkerInfo
from scheduler.worker_state import HEARTBEAT_INTERVAL_S

if TYPE_CHECKING:
    from workers.worker import Worker

logger = logging.getLogger(__name__)


class SchedulerPort(Protocol):
    """What ``scheduler.ray_actor.RayScheduler`` offers."""

    async def handle(self, events: Sequence[Event]) -> list[list[Command]]: ...


class Membership:
    """Lives on the worker's event loop; ``leave_when_empty`` may be called from a signal handler."""

    def __init__(self, worker: Worker, scheduler: SchedulerPort, on_empty: Callable[[], None]) -> None:
        """``on_empty`` is called once, when a worker that shall leave has nothing left to do."""
        self.info: WorkerInfo | None = None  # in its present role; None until it has registered
        self._worker = worker
        self._scheduler = scheduler
        self._on_empty = on_empty
        self._duty = ACTIVE
        self._moving: asyncio.TimerHandle | None = None  # when what runs here is to go on elsewhere
        self._is_leaving = False
        self._interval_s = HEARTBEAT_INTERVAL_S  # between heartbeats

    async def register(self, info: WorkerInfo) -> None:
        """Returns when the scheduler has taken it.

        Raises:
            ConfigError: it refuses this worker for good.
        """
        while not await self._registered(info):  # noqa: ASYNC110  the scheduler is another process: only time tells
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
        self.info = info

    @property
    def is_leaving(self) -> bool:
        return self._is_leaving

    def leave_when_empty(self) -> None:
        """Asks to be drained, with the next heartbeat."""
        self._is_leaving = True

    async def send_heartbeats(self) -> None:
        """Runs until cancelled, or until a worker that leaves is empty."""
        while True:
            await asyncio.sleep(self._interval_s)
            assert self.info is not None, "a worker registers before it reports"
            events: list[Event] = [self._worker.report(self.info.incarnation)]
            if self._is_leaving and self._duty.state is DutyState.ACTIVE:
                events.append(DrainWorker(self.info.worker_id, force=True))
            answers = await self._tell(events)
            if answers is None:
                self._worker.cache_news.begin_anew()  # who knows what arrived
                continue  # tokens go on flowing; the next heartbeat finds the restarted scheduler
            for command in answers[0]:
                await self._obey(command, self.info)
            if self._is_leaving and self._duty.state is DutyState.DRAINED:
                self._on_empty()
                return

    async def leave(self) -> None:
        """Says so; a scheduler that is away will miss the heartbeats."""
        if self.info is not None:
            await self._tell((WorkerLeft(self.info.worker_id, self.info.incarnation),))

    async def _tell(self, events: Sequence[Event]) -> list[list[Command]] | None:
        """What the scheduler answers; None where it is away, or failed at these events."""
        try:
            return await self._scheduler.handle(events)
        except UnavailableError:
            return None
        except Exception:  # a heartbeat's boundary: the fault is in another process, and what runs here runs well
            logger.exception("The scheduler could not take %d events.", len(events))
            return None

    async def _obey(self, command: Command, info: WorkerInfo) -> None:
        if isinstance(command, AskToRegister):
            await self._registered(info)
        if isinstance(command, AskToRegister | AskForCache):
            self._worker.cache_news.begin_anew()
        if isinstance(command, BeatEvery):
            self._interval_s = command.interval_s
        if isinstance(command, TakeDuty):
            self._take(command.duty)
            self.info = replace(info, role=command.role)

    def _take(self, duty: Duty) -> None:
        """It is told again and again; what is new counts from now on."""
        if duty == self._duty:
            return
        self._duty = duty
        if self._moving is not None:
            self._moving.cancel()
        self._worker.move_away(moves=False)
        if duty.state is DutyState.DRAINING and duty.move_after_s is not None:
            move = functools.partial(self._worker.move_away, moves=True)
            self._moving = asyncio.get_running_loop().call_later(duty.move_after_s, move)

    async def _registered(self, info: WorkerInfo) -> bool:
        answers = await self._tell((WorkerRegistered(info, self._duty),))
        if answers is None:
            return False
        self._interval_s = HEARTBEAT_INTERVAL_S  # as a scheduler that knows no more expects
        for command in answers[0]:
            if isinstance(command, RefuseWorker):
                if command.is_final:
                    raise ConfigError(f"Worker {info.worker_id} was refused: {command.message}.")
                return False
        return True
