"""The gateway's side of the scheduler: many requests, one call per tick, and what is done while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kvcache.errors import OverloadedError, RateLimitError, TwinpoolError, UnavailableError
from scheduler.admission import AdmissionControl, AdmissionOptions
from scheduler.controller import ClusterController
from scheduler.delivery import request_of
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
SNAPSHOT_TIMEOUT_S = 5.0  # so it is noticed that the scheduler is away even when nobody asks for anything
SNAPSHOT_WORKERS_PER_S = 400  # not more: of large clusters a snapshot comes later
TELL_DELAY_S = 0.005  # of what nobody waits for
CALLS_AT_ONCE = 2  # one is handled while the other is on its way
PLACE_TIMEOUT_S = 0.5  # then a request is placed here
RETRY_INTERVAL_S = 0.2
RELEARN_S = 10.0  # so long a scheduler that was restarted may take to find its workers before it is asked again
POLL_INTERVAL_S = 0.01  # while requests wait in the scheduler's queue: any call brings what was decided of them
STAND_IN_INTERVAL_S = 0.05  # while somebody stands in: what waits may become late, or have room, as time passes
ASK_INTERVAL_S = 0.5  # after so long they are asked for anew: their places change, and answers may be lost
logger = logging.getLogger(__name__)


class SchedulerPort(Protocol):
    """What ``scheduler.ray_actor.RayScheduler`` offers; tests have the controller in process."""

    async def handle(self, events: Sequence[Event], asker: str = "") -> list[list[Command]]:
        """See ``scheduler.delivery.Delivery.handle``."""
        ...

    async def snapshot(self) -> ClusterSnapshot: ...


@dataclass(slots=True, eq=False)
class _Asked:
    """A request that is to be placed, by the scheduler or by whoever stands in for it."""

    request: RequestArrived
    placed: asyncio.Future[Placement]
    since_s: float
    deadline_s: float = 0.0  # for the scheduler's first answer
    call: int = 0  # the first that can bring it: what came with earlier ones was said before it was asked for anew
    position: int | None = None  # in its queue; None: it has not said that it waits there

    def note_wait(self, now: float) -> None:
        """Before it is asked for elsewhere, so that its time does not begin anew there."""
        self.request = replace(self.request, waited_s=now - self.since_s)


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

    While the scheduler is away, admission and a controller made from its last snapshot stand in for it: the same code,
    on what is known here. Whatever waited in its queue waits in theirs. When the scheduler is back, and has its workers
    back, it is told what runs where, and asked again for what still waits. Each request is in the hands of one of them.
    """

    def __init__(
        self,
        scheduler: SchedulerPort,
        options: PlacementOptions = PlacementOptions(),  # noqa: B008  frozen
        admission: AdmissionOptions = AdmissionOptions(),  # noqa: B008  frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cluster = ClusterSnapshot()
        self._scheduler = scheduler
        self._options = options
        self._admission = admission
        self._clock = clock
        self._name = uuid.uuid4().hex
        self._outbox: list[Event] = []
        self._num_calls = 0
        self._asked: dict[str, _Asked] = {}
        self._unanswered: dict[str, _Asked] = {}  # those of them, in order, of which the scheduler has said nothing
        self._watch: asyncio.TimerHandle | None = None  # over the first of these
        self._queued: dict[str, _Asked] = {}  # those of them that wait in a queue
        self._ask_at_s = 0.0
        self._has_events = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._live: dict[str, _Live] = {}
        self._here: set[str] = set()  # ids of what was asked here, waits or runs: the scheduler does not know of it
        self._stand_in: AdmissionControl | None = None
        self._stand_in_timer: asyncio.TimerHandle | None = None
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
        for timer in (self._watch, self._stand_in_timer):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def place(self, request: RequestArrived) -> Placement:
        """Asks the scheduler, or whoever stands in for it, and waits as long as the request may wait in the queue.

        Raises:
            OverloadedError: the queue is full.
            RateLimitError: it would wait longer than it may, or has.
            UnavailableError: no worker for a phase.
        """
        asked = _Asked(request, asyncio.get_running_loop().create_future(), self._clock())
        self._asked[request.request_id] = asked
        if self._stand_in is None:
            self._ask_scheduler(asked)
        else:
            self._ask_here(asked)
        try:
            return await asked.placed
        except BaseException:
            self.tell(RequestEnded(request.request_id))  # it may be on somebody's books all the same
            raise
        finally:
            if asked.placed.done() and not asked.placed.cancelled():
                asked.placed.exception()  # looked at, also where nobody waits for it any more
            del self._asked[request.request_id]
            self._unanswered.pop(request.request_id, None)
            self._queued.pop(request.request_id, None)

    def position(self, request_id: str) -> int | None:
        """How many are before a waiting request, as of half a second ago; None where it is not in the queue."""
        if self._stand_in is not None:
            return self._stand_in.position(request_id)
        asked = self._queued.get(request_id)
        return asked.position if asked is not None else None

    def tell(self, event: PrefillDone | RequestEnded) -> None:
        """Sends an event that has no answer, with the next call."""
        if isinstance(event, RequestEnded):
            self._live.pop(event.request_id, None)
        elif event.request_id in self._live:
            self._live[event.request_id].is_prefilled = True
        if event.request_id not in self._here:
            self._put(event)
        elif isinstance(event, RequestEnded):
            self._here.remove(event.request_id)
        self._tell_stand_in(event)

    def _ask_scheduler(self, asked: _Asked) -> None:
        """Its first answer must come as soon as a request may go without one."""
        loop = asyncio.get_running_loop()
        asked.deadline_s = loop.time() + PLACE_TIMEOUT_S
        asked.call = self._num_calls + 1
        self._unanswered[asked.request.request_id] = asked
        if self._watch is None:
            self._watch = loop.call_at(asked.deadline_s, self._end_unanswered)
        self._put(asked.request)

    def _end_unanswered(self) -> None:
        """Those whose time has come; one timer for all, for there are thousands in a second."""
        loop, self._watch = asyncio.get_running_loop(), None
        while self._unanswered:
            asked = next(iter(self._unanswered.values()))
            if asked.deadline_s > loop.time():
                self._watch = loop.call_at(asked.deadline_s, self._end_unanswered)
                break
            self._begin_standing_in("The scheduler does not answer.")
            self._move_here(asked)

    # While the scheduler is away

    def _begin_standing_in(self, reason: str) -> None:
        if self._stand_in is not None:
            return
        logger.warning("%s Requests are placed by what was last known.", reason)
        self._seen_again_s = None
        now = self._clock()
        told = [live.told() for live in self._live.values()]
        self._stand_in = AdmissionControl(
            ClusterController.from_snapshot(self.cluster, told, self._options, now), self._admission
        )
        for placed in told:
            self._stand_in.book(placed, now)
        self._let_time_pass()
        for asked in list(self._queued.values()):
            self._move_here(asked)

    def _end_standing_in(self) -> None:
        """The scheduler is told what runs, and then, in order of arrival, what waits."""
        waiting = [asked for name, asked in self._asked.items() if name in self._here and not asked.placed.done()]
        if self._stand_in_timer is not None:
            self._stand_in_timer.cancel()
        self._stand_in = None
        self._here.clear()
        for live in self._live.values():
            self._put(live.told())
        for asked in waiting:
            asked.note_wait(self._clock())
            self._ask_scheduler(asked)

    def _let_time_pass(self) -> None:
        if self._stand_in is not None:
            self._take_all(self._stand_in.advance(self._clock()))
            self._stand_in_timer = asyncio.get_running_loop().call_later(STAND_IN_INTERVAL_S, self._let_time_pass)

    def _tell_stand_in(self, event: Event) -> None:
        if self._stand_in is not None:
            self._take_all(self._stand_in.handle(event, self._clock()))

    def _ask_here(self, asked: _Asked) -> None:
        self._here.add(asked.request.request_id)
        self._tell_stand_in(asked.request)

    def _move_here(self, asked: _Asked) -> None:
        """What the scheduler was asked for; what it still says of it is not heard."""
        request_id = asked.request.request_id
        self._unanswered.pop(request_id, None)
        if request_id not in self._here and not asked.placed.done():
            self._put(RequestEnded(request_id))
            asked.note_wait(self._clock())
            self._ask_here(asked)

    # Calls

    def _put(self, event: Event) -> None:
        """What nobody waits for goes a little later, with others: every call takes the scheduler a millisecond."""
        self._outbox.append(event)
        if isinstance(event, RequestArrived) or self._has_waiting:  # in the queue they wait for the end of others
            self._has_events.set()
        elif len(self._outbox) == 1:
            asyncio.get_running_loop().call_later(TELL_DELAY_S, self._has_events.set)

    @property
    def _has_waiting(self) -> bool:
        """Whether anything waits in the scheduler's queue."""
        return bool(self._queued) and self._stand_in is None

    async def _send(self, *, polls: bool) -> None:
        """One of ``CALLS_AT_ONCE``; the one that polls also calls with nothing to say, while requests wait."""
        while True:
            await self._await_events(polls)
            batch = self._empty_outbox()
            if not batch and not (polls and self._has_waiting):
                continue  # another was first
            self._num_calls += 1
            call = self._num_calls
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
                self._take_all(commands, call)

    def _empty_outbox(self) -> list[Event]:
        """What is to be sent. Nothing is asked for that has its answer, has moved or is gone meanwhile."""
        batch, self._outbox = self._outbox, []
        return [event for event in batch if not isinstance(event, RequestArrived) or self._asked_by(event)]

    async def _await_events(self, polls: bool) -> None:
        """Until there is something to send, or time to see what became of waiting requests."""
        now = self._clock()
        if polls and self._has_waiting and now >= self._ask_at_s:
            self._ask_at_s = now + ASK_INTERVAL_S
            for asked in self._queued.values():
                self._put(asked.request)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_INTERVAL_S if polls and self._has_waiting else None):
                await self._has_events.wait()
        self._has_events.clear()

    def _take_all(self, commands: Iterable[Command], call: int | None = None) -> None:
        """Answers that a call of the scheduler brought, or without one those of whoever stands in for it.

        About each request one of them is heard, and only what is said since it was asked last.
        """
        for command in commands:
            request_id = request_of(command) or ""
            asked = self._asked.get(request_id)
            if asked is None or asked.placed.done():
                continue
            is_here = request_id in self._here
            if is_here if call is None else not is_here and call >= asked.call:
                self._unanswered.pop(request_id, None)
                self._take(asked, command, is_here)

    def _take(self, asked: _Asked, command: Command, here: bool) -> None:
        if isinstance(command, PlaceRequest):
            live = self._live[asked.request.request_id] = _Live(asked.request, command.placement)
            asked.placed.set_result(command.placement)
            if not here:
                self._tell_stand_in(live.told())  # if there is one by now
        elif self._stand_in is not None and not here:
            self._move_here(asked)  # the scheduler may have lost its workers, and what waits there may wait long
        elif isinstance(command, RefuseRequest):
            asked.placed.set_exception(_error_of(command, here))
        elif isinstance(command, RequestQueued):
            asked.position = command.position
            if not self._queued:
                self._has_events.set()  # whoever polls has not waited with a timeout so far
            self._queued[command.request_id] = asked

    def _answer_unavailable(self, batch: Sequence[Event], error: UnavailableError) -> None:
        """Requests are asked for here at once, those in the queue too; what needs no answer is kept for its return.

        But for what runs: that is told then in any case, and here it might come after its end, from an earlier batch.
        """
        self._outbox[:0] = [event for event in batch if not isinstance(event, RequestArrived | RequestPlaced)]
        self._begin_standing_in(error.message)
        for asked in self._asked_in(batch):
            self._move_here(asked)
        if self._outbox:
            self._has_events.set()

    def _asked_in(self, batch: Sequence[Event]) -> Iterator[_Asked]:
        """What is still the scheduler's to answer."""
        for event in batch:
            asked = self._asked_by(event) if isinstance(event, RequestArrived) else None
            if asked is not None:
                yield asked

    def _asked_by(self, event: RequestArrived) -> _Asked | None:
        """None where the scheduler need not answer it: the request has its answer, has moved, or is asked for anew."""
        asked = self._asked.get(event.request_id)
        is_open = asked is not None and asked.request is event and not asked.placed.done()
        return asked if is_open and event.request_id not in self._here else None

    def _fail(self, batch: Sequence[Event], error: TwinpoolError) -> None:
        for asked in self._asked_in(batch):
            asked.placed.set_exception(error)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(max(SNAPSHOT_INTERVAL_S, len(self.cluster.workers) / SNAPSHOT_WORKERS_PER_S))
            try:
                async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
                    snapshot = await self._scheduler.snapshot()
                self._hear(snapshot)
            except UnavailableError as error:
                self._begin_standing_in(error.message)
            except TimeoutError:
                self._begin_standing_in("The scheduler gives no view of the cluster.")
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
            self._end_standing_in()


def _error_of(command: RefuseRequest, here: bool) -> OverloadedError:
    match command.reason:
        case Refusal.UNAVAILABLE if here:
            return UnavailableError("The scheduler does not answer, and no worker that was known can take the request.")
        case Refusal.UNAVAILABLE:
            return UnavailableError(command.message, command.retry_after_s)
        case Refusal.QUEUE_FULL:
            return OverloadedError(command.message, command.retry_after_s)
        case Refusal.TTFT_TARGET:
            return RateLimitError(command.message, command.retry_after_s, command.reason.value)
