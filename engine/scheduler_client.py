"""The gateway's side of the scheduler: many requests, one call per tick, and what is done while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvcache.errors import OverloadedError, RateLimitError, TwinpoolError, UnavailableError
from scheduler.controller import ClusterController
from scheduler.events import (
    Command,
    Event,
    PlaceRequest,
    PrefillDone,
    Refusal,
    RefuseRequest,
    RequestArrived,
    RequestEnded,
    RequestPlaced,
    RequestQueued,
)
from scheduler.placement import PlacementOptions
from scheduler.policies import can_place
from scheduler.types import ClusterSnapshot, Placement

SNAPSHOT_INTERVAL_S = 0.5
SNAPSHOT_WORKERS_PER_S = 400  # not more: of large clusters a snapshot comes later
TELL_DELAY_S = 0.005  # of what nobody waits for
CALLS_AT_ONCE = 2  # one is handled while the other is on its way
PLACE_TIMEOUT_S = 0.5  # then a request is placed here
RETRY_INTERVAL_S = 0.2
RELEARN_S = 10.0  # so long a scheduler that was restarted may take to find its workers before it is asked again
POLL_INTERVAL_S = 0.01  # while requests wait in the scheduler's queue: any call brings what was decided of them
ASK_INTERVAL_S = 0.5  # after so long they are asked for anew: their places change, and answers may be lost
logger = logging.getLogger(__name__)


class SchedulerPort(Protocol):
    """What ``scheduler.ray_actor.RayScheduler`` offers; tests have the controller in process."""

    async def handle(self, events: Sequence[Event], asker: str = "") -> list[list[Command]]:
        """See ``scheduler.delivery.Delivery.handle``."""
        ...

    async def snapshot(self) -> ClusterSnapshot: ...


class _AwayError(UnavailableError):
    """The scheduler did not take the request; nothing is wrong with the request."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A request that the scheduler was asked to place."""

    request: RequestArrived
    placed: asyncio.Future[Placement]
    deadline_s: float  # for its first answer
    position: int | None = None  # in its queue; None: it has not said that it waits there


@dataclass(slots=True, eq=False)
class _Live:
    """A request that was placed, until its end."""

    request: RequestArrived
    placement: Placement
    is_prefilled: bool = False

    def told(self) -> RequestPlaced:
        """For a scheduler that does not know of it."""
        own = self.request
        return RequestPlaced(
            self.placement, own.num_prompt_tokens, own.max_tokens, self.is_prefilled, own.tenant, own.urgency
        )


class SchedulerClient:
    """Collects events while calls are under way and sends them together in the next. One event loop owns it.

    While a request waits in the scheduler's queue, the scheduler is called every few milliseconds, even if there is
    nothing to tell it.

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
        self._name = uuid.uuid4().hex
        self._outbox: list[Event] = []
        self._asked: dict[str, _Asked] = {}
        self._unanswered: dict[str, _Asked] = {}  # those of them, in order, of which the scheduler has said nothing
        self._watch: asyncio.TimerHandle | None = None  # over the first of these
        self._queued: dict[str, _Asked] = {}  # those of them that wait in the scheduler's queue
        self._ask_at_s = 0.0
        self._has_events = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._live: dict[str, _Live] = {}
        self._placed_here: set[str] = set()  # of them those that the scheduler has not been told of
        self._stand_in: ClusterController | None = None
        self._seen_again_s: float | None = None  # when a scheduler that was away first answered

    @property
    def is_ready(self) -> bool:
        """Whether a request that comes now would be placed, or wait for a place."""
        return can_place(self.cluster, self._options)

    @property
    def is_scheduler_away(self) -> bool:
        return self._stand_in is not None

    async def start(self) -> None:
        """Fetches a first snapshot and begins to send.

        Raises:
            UnavailableError: the scheduler does not answer.
        """
        self.cluster = await self._scheduler.snapshot()
        senders = [asyncio.create_task(self._send(polls=number == 0)) for number in range(CALLS_AT_ONCE)]
        self._tasks = [*senders, asyncio.create_task(self._refresh())]

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def place(self, request: RequestArrived) -> Placement:
        """Asks the scheduler, or decides here when it is away.

        Raises:
            OverloadedError: the queue is full.
            RateLimitError: it would wait longer than it may, or has.
            UnavailableError: no worker for a phase.
        """
        try:
            placement = await self._ask(request) if self._stand_in is None else self._place_here(request)
        except _AwayError as error:
            self._begin_standing_in(error.message)
            placement = self._place_here(request)
        self._live[request.request_id] = _Live(request, placement)
        return placement

    def position(self, request_id: str) -> int | None:
        """How many are before a waiting request, as of half a second ago; None where it is not in the queue."""
        asked = self._queued.get(request_id)
        return asked.position if asked is not None else None

    def tell(self, event: PrefillDone | RequestEnded) -> None:
        """Sends an event that has no answer, with the next call."""
        if isinstance(event, RequestEnded):
            self._live.pop(event.request_id, None)
        elif event.request_id in self._live:
            self._live[event.request_id].is_prefilled = True
        if self._stand_in is not None:
            self._stand_in.handle(event, self._clock())
        if event.request_id not in self._placed_here:
            self._put(event)
        elif isinstance(event, RequestEnded):
            self._placed_here.remove(event.request_id)

    async def _ask(self, request: RequestArrived) -> Placement:
        """Waits for the first answer as long as a request may go without one, and for a place in the queue's time."""
        loop = asyncio.get_running_loop()
        asked = _Asked(request, loop.create_future(), loop.time() + PLACE_TIMEOUT_S)
        self._asked[request.request_id] = self._unanswered[request.request_id] = asked
        if self._watch is None:
            self._watch = loop.call_at(asked.deadline_s, self._end_unanswered)
        self._put(request)
        try:
            return await asked.placed
        except BaseException:
            self._put(RequestEnded(request.request_id))  # it may be on the scheduler's books all the same
            raise
        finally:
            if asked.placed.done() and not asked.placed.cancelled():
                asked.placed.exception()  # looked at, also where nobody waits for it any more
            del self._asked[request.request_id]
            self._unanswered.pop(request.request_id, None)
            self._queued.pop(request.request_id, None)

    def _end_unanswered(self) -> None:
        """Those whose time has come; one timer for all, for there are thousands in a second."""
        loop, self._watch = asyncio.get_running_loop(), None
        for asked in self._unanswered.values():
            if asked.deadline_s > loop.time():
                self._watch = loop.call_at(asked.deadline_s, self._end_unanswered)
                break
            if not asked.placed.done():
                asked.placed.set_exception(_AwayError("The scheduler does not answer."))

    def _place_here(self, request: RequestArrived) -> Placement:
        assert self._stand_in is not None, "somebody stands in"
        (command,) = self._stand_in.handle(request, self._clock())
        if isinstance(command, PlaceRequest):
            self._placed_here.add(request.request_id)
            return command.placement
        raise UnavailableError("The scheduler does not answer, and no worker that was known can take the request.")

    def _begin_standing_in(self, reason: str) -> None:
        if self._stand_in is None:
            logger.warning("%s Requests are placed by what was last known.", reason)
            self._seen_again_s = None
            self._stand_in = ClusterController.from_snapshot(
                self.cluster, (live.told() for live in self._live.values()), self._options, self._clock()
            )
            self._fail([asked.request for asked in self._queued.values()], _AwayError(reason))

    def _put(self, event: Event) -> None:
        """What nobody waits for goes a little later, with others: every call takes the scheduler a millisecond."""
        self._outbox.append(event)
        if isinstance(event, RequestArrived) or self._queued:  # in the queue they wait for the end of others
            self._has_events.set()
        elif len(self._outbox) == 1:
            asyncio.get_running_loop().call_later(TELL_DELAY_S, self._has_events.set)

    async def _send(self, *, polls: bool) -> None:
        """One of ``CALLS_AT_ONCE``; the one that polls also calls with nothing to say, while requests wait."""
        while True:
            await self._await_events(polls)
            batch, self._outbox = self._outbox, []
            if not batch and not (polls and self._queued):
                continue  # another was first
            try:
                answers = await self._scheduler.handle(batch, self._name)
            except UnavailableError as error:
                self._answer_unavailable(batch, error)
                await asyncio.sleep(RETRY_INTERVAL_S)
                continue
            except Exception as error:  # the top of this task, which must go on; the events of one batch are lost
                logger.exception("The scheduler could not take %d events.", len(batch))
                self._fail(batch, TwinpoolError(f"the scheduler failed: {type(error).__name__}"))
                continue
            for commands in answers:
                for command in commands:
                    self._take(command)

    async def _await_events(self, polls: bool) -> None:
        """Until there is something to send, or time to see what became of waiting requests."""
        now = self._clock()
        if polls and self._queued and now >= self._ask_at_s:
            self._ask_at_s = now + ASK_INTERVAL_S
            for asked in self._queued.values():
                self._put(asked.request)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_INTERVAL_S if polls and self._queued else None):
                await self._has_events.wait()
        self._has_events.clear()

    def _take(self, command: Command) -> None:
        match command:
            case PlaceRequest():
                asked = self._asked.get(command.placement.request_id)
                if asked is not None and not asked.placed.done():
                    asked.placed.set_result(command.placement)
            case RefuseRequest():
                asked = self._asked.get(command.request_id)
                if asked is not None and not asked.placed.done():
                    asked.placed.set_exception(_error_of(command))
            case RequestQueued():
                asked = self._asked.get(command.request_id)
                if asked is not None and not asked.placed.done():
                    asked.position = command.position
                    self._unanswered.pop(command.request_id, None)
                    if not self._queued:
                        self._has_events.set()  # whoever polls has not waited with a timeout so far
                    self._queued[command.request_id] = asked

    def _answer_unavailable(self, batch: Sequence[Event], error: UnavailableError) -> None:
        """Requests are placed here at once, those in the queue too; what needs no answer is kept for its return."""
        self._begin_standing_in(error.message)
        self._outbox[:0] = [event for event in batch if not isinstance(event, RequestArrived)]
        if self._outbox:
            self._has_events.set()
        self._fail(batch, _AwayError(error.message))

    def _fail(self, batch: Sequence[Event], error: TwinpoolError) -> None:
        for event in batch:
            asked = self._asked.get(event.request_id) if isinstance(event, RequestArrived) else None
            if asked is not None and not asked.placed.done():
                asked.placed.set_exception(error)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(max(SNAPSHOT_INTERVAL_S, len(self.cluster.workers) / SNAPSHOT_WORKERS_PER_S))
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
            for live in self._live.values():
                self._put(live.told())


def _error_of(command: RefuseRequest) -> OverloadedError:
    match command.reason:
        case Refusal.UNAVAILABLE:
            return UnavailableError(command.message, command.retry_after_s)
        case Refusal.QUEUE_FULL:
            return OverloadedError(command.message, command.retry_after_s)
        case Refusal.TTFT_TARGET:
            return RateLimitError(command.message, command.retry_after_s, command.reason.value)
