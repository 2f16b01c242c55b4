"""The gateway's side of the scheduler: many requests, one call per tick, and the newest view of the cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from kvcache.errors import TwinpoolError, UnavailableError
from scheduler.events import Command, Event, PlaceRequest, RefuseRequest, RequestArrived, RequestEnded
from scheduler.types import ClusterSnapshot, Placement

SNAPSHOT_INTERVAL_S = 0.5
PLACE_TIMEOUT_S = 5.0
RETRY_INTERVAL_S = 0.2
_Entry = tuple[Event, "asyncio.Future[Placement] | None"]  # None: nobody waits for an answer
logger = logging.getLogger(__name__)


class SchedulerPort(Protocol):
    """What ``scheduler.ray_actor.RayScheduler`` offers; tests have the controller in process."""

    async def handle(self, events: Sequence[Event]) -> list[list[Command]]: ...

    async def snapshot(self) -> ClusterSnapshot: ...


class SchedulerClient:
    """Collects events while a call is under way and sends them together in the next. One event loop owns it."""

    def __init__(self, scheduler: SchedulerPort) -> None:
        self.cluster = ClusterSnapshot()
        self._scheduler = scheduler
        self._outbox: list[_Entry] = []
        self._has_events = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Fetches a first snapshot and begins to send.

        Raises:
            UnavailableError: the scheduler does not answer.
        """
        self.cluster = await self._scheduler.snapshot()
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._refresh())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def place(self, request: RequestArrived) -> Placement:
        """
        Raises:
            UnavailableError: no worker for a phase, or no scheduler to ask.
        """
        placed: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self._put(request, placed)
        try:
            async with asyncio.timeout(PLACE_TIMEOUT_S):  # not wait_for: in Python 3.11 that can lose a cancellation
                return await placed
        except BaseException as error:
            self.tell(RequestEnded(request.request_id))  # it may be on the scheduler's books all the same
            if isinstance(error, TimeoutError):
                raise UnavailableError("The scheduler does not answer.") from None
            raise

    def tell(self, event: Event) -> None:
        """Sends an event that has no answer, with the next call."""
        self._put(event, None)

    def _put(self, event: Event, placed: asyncio.Future[Placement] | None) -> None:
        self._outbox.append((event, placed))
        self._has_events.set()

    async def _send(self) -> None:
        while True:
            await self._has_events.wait()
            self._has_events.clear()
            batch, self._outbox = self._outbox, []
            try:
                answers = await self._scheduler.handle([event for event, _ in batch])
            except UnavailableError as error:
                logger.warning("%s", error)
                self._answer_unavailable(batch, error)
                await asyncio.sleep(RETRY_INTERVAL_S)
                continue
            except Exception as error:  # the top of this task, which must go on; the events of one batch are lost
                logger.exception("The scheduler could not take %d events.", len(batch))
                for _, placed in batch:
                    if placed is not None and not placed.done():
                        placed.set_exception(TwinpoolError(f"the scheduler failed: {type(error).__name__}"))
                continue
            for (_, placed), commands in zip(batch, answers, strict=True):
                if placed is not None and not placed.done():
                    _resolve(placed, commands)

    def _answer_unavailable(self, batch: Sequence[_Entry], error: UnavailableError) -> None:
        """Requests are told at once; what needs no answer is kept for the scheduler's return."""
        self._outbox[:0] = [entry for entry in batch if entry[1] is None]
        if self._outbox:
            self._has_events.set()
        for _, placed in batch:
            if placed is not None and not placed.done():
                placed.set_exception(UnavailableError(error.message))

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_INTERVAL_S)
            try:
                self.cluster = await self._scheduler.snapshot()
            except UnavailableError:
                pass  # keeps the last view; placing will tell
            except Exception:  # the top of this task, which must go on
                logger.exception("The scheduler gave no view of the cluster.")


def _resolve(placed: asyncio.Future[Placement], commands: Sequence[Command]) -> None:
    for command in commands:
        if isinstance(command, PlaceRequest):
            placed.set_result(command.placement)
        elif isinstance(command, RefuseRequest):
            placed.set_exception(UnavailableError(command.message))
