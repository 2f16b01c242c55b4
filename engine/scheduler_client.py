"""The gateway's side of the scheduler: many requests, one call per tick, and what is done while it is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from kvcache.errors import TwinpoolError, UnavailableError
from scheduler.controller import ClusterController
from scheduler.events import (
    Command,
    Event,
    PlaceRequest,
    PrefillDone,
    RefuseRequest,
    RequestArrived,
    RequestEnded,
    RequestPlaced,
)
from scheduler.placement import PlacementOptions
from scheduler.types import ClusterSnapshot, Placement

SNAPSHOT_INTERVAL_S = 0.5
PLACE_TIMEOUT_S = 0.5  # then a request is placed here
RETRY_INTERVAL_S = 0.2
RELEARN_S = 10.0  # so long a scheduler that was restarted may take to find its workers before it is asked again
_Entry = tuple[Event, "asyncio.Future[Placement] | None"]  # None: nobody waits for an answer
logger = logging.getLogger(__name__)


class SchedulerPort(Protocol):
    """What ``scheduler.ray_actor.RayScheduler`` offers; tests have the controller in process."""

    async def handle(self, events: Sequence[Event]) -> list[list[Command]]: ...

    async def snapshot(self) -> ClusterSnapshot: ...


class _AwayError(UnavailableError):
    """The scheduler did not take the request; nothing is wrong with the request."""


class SchedulerClient:
    """Collects events while a call is under way and sends them together in the next. One event loop owns it.

    While the scheduler is away a controller made from its last snapshot stands in for it: the same code, on what is
    known here. When the scheduler is back, and has its workers back, it is told what runs where.
    """

    def __init__(
        self,
        scheduler: SchedulerPort,
        options: PlacementOptions = PlacementOptions(),  # noqa: B008  frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cluster = ClusterSnapshot()
        self._scheduler = scheduler
        self._options = options
        self._clock = clock
        self._outbox: list[_Entry] = []
        self._has_events = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._live: dict[str, RequestPlaced] = {}  # by request id
        self._placed_here: set[str] = set()  # of them those that the scheduler has not been told of
        self._stand_in: ClusterController | None = None
        self._seen_again_s: float | None = None  # when a scheduler that was away first answered

    @property
    def is_scheduler_away(self) -> bool:
        return self._stand_in is not None

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
        """Asks the scheduler, or decides here when it is away.

        Raises:
            UnavailableError: no worker for a phase.
        """
        try:
            placement = await self._ask(request) if self._stand_in is None else self._place_here(request)
        except _AwayError as error:
            self._begin_standing_in(error.message)
            placement = self._place_here(request)
        if self._stand_in is not None:
            self._placed_here.add(request.request_id)
        placed = RequestPlaced(placement, request.num_prompt_tokens, request.max_tokens, is_prefilled=False)
        self._live[request.request_id] = placed
        return placement

    def tell(self, event: PrefillDone | RequestEnded) -> None:
        """Sends an event that has no answer, with the next call."""
        if isinstance(event, RequestEnded):
            self._live.pop(event.request_id, None)
        elif event.request_id in self._live:
            self._live[event.request_id] = replace(self._live[event.request_id], is_prefilled=True)
        if self._stand_in is not None:
            self._stand_in.handle(event, self._clock())
        if event.request_id not in self._placed_here:
            self._put(event, None)
        elif isinstance(event, RequestEnded):
            self._placed_here.remove(event.request_id)

    async def _ask(self, request: RequestArrived) -> Placement:
        placed: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self._put(request, placed)
        try:
            async with asyncio.timeout(PLACE_TIMEOUT_S):  # not wait_for: in Python 3.11 that can lose a cancellation
                return await placed
        except BaseException as error:
            self._put(RequestEnded(request.request_id), None)  # it may be on the scheduler's books all the same
            if isinstance(error, TimeoutError):
                raise _AwayError("The scheduler does not answer.") from None
            raise

    def _place_here(self, request: RequestArrived) -> Placement:
        assert self._stand_in is not None, "somebody stands in"
        (command,) = self._stand_in.handle(request, self._clock())
        if isinstance(command, PlaceRequest):
            return command.placement
        raise UnavailableError("The scheduler does not answer, and no worker that was known can take the request.")

    def _begin_standing_in(self, reason: str) -> None:
        if self._stand_in is None:
            logger.warning("%s Requests are placed by what was last known.", reason)
            self._seen_again_s = None
            self._stand_in = ClusterController.from_snapshot(
                self.cluster, self._live.values(), self._options, self._clock()
            )

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
        """Requests are placed here at once; what needs no answer is kept for the scheduler's return."""
        self._begin_standing_in(error.message)
        self._outbox[:0] = [entry for entry in batch if entry[1] is None]
        if self._outbox:
            self._has_events.set()
        for _, placed in batch:
            if placed is not None and not placed.done():
                placed.set_exception(_AwayError(error.message))

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_INTERVAL_S)
            try:
                self._hear(await self._scheduler.snapshot())
            except UnavailableError as error:
                self._begin_standing_in(error.message)
            except Exception:  # the top of this task, which must go on
                logger.exception("The scheduler gave no view of the cluster.")

    def _hear(self, snapshot: ClusterSnapshot) -> None:
        """One that was restarted knows no workers at first, and none of the requests."""
        has_forgotten = snapshot.epoch != self.cluster.epoch
        if not has_forgotten and self._stand_in is None:
            self.cluster = snapshot
            return
        now = self._clock()
        self._begin_standing_in("The scheduler was restarted.")
        if self._seen_again_s is None:
            self._seen_again_s = now
        expected = {worker.info.worker_id for worker in self.cluster.workers}
        is_whole = expected <= {worker.info.worker_id for worker in snapshot.workers}
        if is_whole or now - self._seen_again_s >= RELEARN_S:
            logger.info("The scheduler is back with %d workers.", len(snapshot.workers))
            self.cluster = snapshot
            self._stand_in = None
            self._placed_here.clear()
            for placed in self._live.values():
                self._put(placed, None)


def _resolve(placed: asyncio.Future[Placement], commands: Sequence[Command]) -> None:
    for command in commands:
        if isinstance(command, PlaceRequest):
            placed.set_result(command.placement)
        elif isinstance(command, RefuseRequest):
            placed.set_exception(UnavailableError(command.message))
