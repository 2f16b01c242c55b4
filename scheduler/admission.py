"""When a request is placed: at once, after a wait in line, or not at all.

It stands before the controller, which says where. A request is handed on when there is room for it, and waits in the
queue otherwise (``scheduler.queue`` says who is next). Where late requests are refused, what is predicted to miss its
time to first token is refused at once: its wait, its prompt and its handoff taken together. What has missed it while it
waited is refused then, and what does not fit into the queue has to leave.

Batch requests are handed on only while no interactive one waits and the predicted load keeps the targets.
Interactive ones do not wait for places that batch sequences hold: those are preempted for them on the worker.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Protocol

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
    Tick,
)
from scheduler.pace import Pace
from scheduler.placement import TPOT_TARGET_S, TTFT_TARGET_S, FirstToken, Outlook
from scheduler.queue import Waiting, WaitingQueue
from scheduler.types import ClusterSnapshot
from scheduler.urgency import ServiceClass, Urgency

OUTPUT_WEIGHT = 2.0  # an output token costs its tenant as much as so many prompt tokens, as in the paper
OUTPUT_TOKENS_GUESS = 128.0  # the length of a tenant's answers before any has ended
_OUTPUT_MEMORY = 0.1  # what the newest answer counts in the mean length
SHARED_BACKLOG_S = 1.0  # of prompts placed ahead, where tenants take turns: who is next is decided late
NEVER_RETRY_S = 60.0  # for a prompt that is late when nobody is before it: workers may come, or have it cached
BATCH_BACKLOG_S = 0.5  # the same for batch prompts: enough that no worker runs dry until the next are placed


@dataclass(frozen=True, slots=True)
class AdmissionOptions:
    """What operators choose."""

    max_queued_requests: int = 1024
    ttft_target_s: float = TTFT_TARGET_S
    tpot_target_s: float = TPOT_TARGET_S  # batch work keeps out where interactive sequences would miss it
    refuses_late: bool = False  # what cannot keep the target for the first token; else it waits
    tenant_weights: tuple[tuple[str, float], ...] = ()


class Placer(Protocol):
    """What ``scheduler.controller.ClusterController`` offers."""

    def handle(self, event: Event, now: float) -> list[Command]: ...

    def snapshot(self, after: str = "", limit: int | None = None) -> ClusterSnapshot: ...

    @property
    def num_places(self) -> int:
        """Sequences that the workers decode at once."""
        ...

    def outlook(self, num_prompt_tokens: int, now: float) -> Outlook | None:
        """None where no worker takes a phase."""
        ...

    def place(
        self, request: RequestArrived, now: float, ttft_limit_s: float | None = None
    ) -> PlaceRequest | RefuseRequest | FirstToken:
        """As ``handle`` of the request; but one whose first token would take longer than the limit is not placed."""
        ...

    def refused(self, request: RequestArrived, now: float) -> None:
        """Hears of an interactive request that was not placed for want of workers."""
        ...

    def least_prefill_s(self, request: RequestArrived) -> float | None:
        """Predicted to compute what is not cached of its prompt, with nobody before it; None: nobody computes any."""
        ...


@dataclass(slots=True)
class _Admitted:
    """A request that was handed on, until its end."""

    command: PlaceRequest
    tenant: str
    service_class: ServiceClass
    num_prompt_tokens: int
    num_output_tokens: float  # predicted, and charged
    is_prefilled: bool = False


class AdmissionControl:
    """The controller with a queue before it: the same events, and commands about queued requests after any of them.

    No I/O, no clock, no randomness. Each event costs the same however many wait or run, but for positions.
    """

    def __init__(self, placer: Placer, options: AdmissionOptions = AdmissionOptions()) -> None:
        self._placer = placer
        self._options = options
        weights = dict(options.tenant_weights)
        self._queue = WaitingQueue(options.max_queued_requests, weights)
        self._is_shared = len(weights) > 1
        self._arrived: dict[str, RequestArrived] = {}  # of those in the queue
        self._queued_tokens: Counter[ServiceClass] = Counter()  # of their prompts
        self._admitted: dict[str, _Admitted] = {}
        self._running: Counter[ServiceClass] = Counter()  # of the admitted
        self._prompt_tokens: Counter[ServiceClass] = Counter()  # of admitted prompts whose first token is not out
        self._prefill_pace = Pace()  # prompt tokens
        self._place_pace = Pace()  # sequences that end
        self._mean_output: dict[str, float] = {}  # tokens, by tenant
        self._num_arrivals = 0

    def handle(self, event: Event, now: float) -> list[Command]:
        """See ``ClusterController.handle``. Whoever asked for a request finds its id in the command."""
        match event:
            case RequestArrived():
                return self._arrive(event, now)
            case RequestEnded():
                self._end(event, now)
            case PrefillDone():
                self._end_prefill(event.request_id, now)
            case RequestPlaced():
                self.book(event, now)
            case Tick():
                event = Tick(self._queue.length_of(ServiceClass.INTERACTIVE))
        return [*self._placer.handle(event, now), *self.advance(now)]

    def advance(self, now: float) -> list[Command]:
        """Lets time pass: what has to leave the queue, and what may."""
        commands: list[Command] = []
        if not len(self._queue):
            return commands
        for late in self._queue.pop_expired(now):
            event = self._forget(late)
            assert late.deadline_s is not None, "it has passed"
            own_s = late.since_s + self._options.ttft_target_s - late.deadline_s
            commands.append(self._late(event, now - late.since_s, own_s, self._predicted_wait_s(event, now), now))
        for service_class in ServiceClass:
            while (item := self._queue.first(service_class)) is not None:
                event = self._arrived[item.request_id]
                if not self._has_room(event, now):
                    return commands  # the classes behind it wait too
                commands.append(self._admit(event, now, item.since_s))
                self._queue.remove(item.request_id)  # after it was charged: its tenant may leave the queue with it
                self._forget(item)
        return commands

    def position(self, request_id: str) -> int | None:
        """How many are before it; None where it does not wait."""
        return self._queue.position(request_id)

    def snapshot(self, after: str = "", limit: int | None = None) -> ClusterSnapshot:
        """As ``ClusterController.snapshot``."""
        return replace(
            self._placer.snapshot(after, limit),
            queued_interactive=self._queue.length_of(ServiceClass.INTERACTIVE),
            queued_batch=self._queue.length_of(ServiceClass.BATCH),
        )

    def _arrive(self, event: RequestArrived, now: float) -> list[Command]:
        """Asking again is answered again: answers may be lost."""
        admitted = self._admitted.get(event.request_id)
        if admitted is not None:
            return [admitted.command]
        if event.request_id in self._queue:
            return [self._queued(event.request_id)]
        if event.is_continued:  # it has had its turn, and lost its worker
            return [self._admit(event, now, now - event.waited_s)]
        commands = self.advance(now)
        if not self._has_waiting(event.urgency) and self._has_room(event, now):
            return [*commands, self._admit(event, now, now - event.waited_s)]
        return commands + self._enqueue(event, now)

    def _enqueue(self, event: RequestArrived, now: float) -> list[Command]:
        patience_s = None
        own_s = self._placer.least_prefill_s(event) if self._must_be_in_time(event) else None
        if own_s is not None:
            patience_s = self._options.ttft_target_s - own_s - event.waited_s
            wait_s = self._predicted_wait_s(event, now)
            if wait_s > patience_s:
                return [self._late(event, event.waited_s + wait_s, own_s, wait_s - patience_s, now)]
        # Counting who is before it would take a walk over all that wait; those that ask again have one in common.
        num_ahead = round(self._queue.num_ahead(event.tenant, event.urgency))
        self._num_arrivals += 1
        item = Waiting(
            event.request_id,
            event.tenant,
            event.urgency,
            self._service(event),
            self._num_arrivals,
            now - event.waited_s,
            None if patience_s is None else now + patience_s,
        )
        self._arrived[event.request_id] = event
        self._queued_tokens[event.urgency.service_class] += event.num_prompt_tokens
        pushed_out = self._queue.push(item)
        commands: list[Command] = []
        if pushed_out is not None:
            commands.append(self._pushed_out(self._forget(pushed_out), now))
        if pushed_out is not item:
            commands.append(RequestQueued(event.request_id, num_ahead))
        return commands

    def _queued(self, request_id: str) -> RequestQueued:
        position = self._queue.position(request_id)
        assert position is not None, "it waits"
        return RequestQueued(request_id, position)

    def _forget(self, item: Waiting) -> RequestArrived:
        event = self._arrived.pop(item.request_id)
        self._queued_tokens[event.urgency.service_class] -= event.num_prompt_tokens
        return event

    def _admit(self, event: RequestArrived, now: float, since_s: float) -> Command:
        """Hands a request on that has waited since then, and charges its tenant; or refuses it, if it would be late."""
        limit_s = since_s + self._options.ttft_target_s - now if self._must_be_in_time(event) else None
        command = self._placer.place(event, now, limit_s)
        if isinstance(command, FirstToken):
            wait_s = now - since_s + command.wait_s
            retry_after_s = wait_s + command.own_s - self._options.ttft_target_s
            return self._late(event, wait_s, command.own_s, retry_after_s, now)
        if not isinstance(command, PlaceRequest):
            return command
        book_service = self._queue.charge if event.request_id in self._queue else self._queue.serve_at_once
        book_service(event.tenant, event.urgency.service_class, self._service(event))
        tenant, service_class = event.tenant, event.urgency.service_class
        num_output_tokens = self._expected_output(event)
        self._book(_Admitted(command, tenant, service_class, event.num_prompt_tokens, num_output_tokens), now)
        return command

    def book(self, event: RequestPlaced, now: float) -> None:
        """Placed by another than this one: it holds a place, and its tenant pays. The controller knows of it already,
        or will be told."""
        request_id = event.placement.request_id
        self._leave_queue(request_id)
        if request_id not in self._admitted:
            command, own = PlaceRequest(event.placement), event.urgency.service_class
            self._queue.serve_at_once(event.tenant, own, self._service(event))
            num_output_tokens = self._expected_output(event)
            self._book(_Admitted(command, event.tenant, own, event.num_prompt_tokens, num_output_tokens), now)
            if event.is_prefilled:
                self._end_prefill(request_id, now)

    def _book(self, admitted: _Admitted, now: float) -> None:
        self._admitted[admitted.command.placement.request_id] = admitted
        self._running[admitted.service_class] += 1
        self._prompt_tokens[admitted.service_class] += admitted.num_prompt_tokens
        self._prefill_pace.begin(now)
        if self._running.total() >= self._placer.num_places:
            self._place_pace.begin(now)

    def _end_prefill(self, request_id: str, now: float) -> None:
        admitted = self._admitted.get(request_id)
        if admitted is None or admitted.is_prefilled:
            return
        admitted.is_prefilled = True
        num_tokens = admitted.num_prompt_tokens
        self._prompt_tokens[admitted.service_class] -= num_tokens
        self._prefill_pace.done(num_tokens, now, is_over=not self._prompt_tokens.total())

    def _end(self, event: RequestEnded, now: float) -> None:
        self._leave_queue(event.request_id)
        self._end_prefill(event.request_id, now)
        admitted = self._admitted.pop(event.request_id, None)
        if admitted is None:
            return
        tenant, service_class = admitted.tenant, admitted.service_class
        self._running[service_class] -= 1
        self._place_pace.done(1, now, is_over=self._running.total() < self._placer.num_places)
        wrong = event.num_delivered_tokens - admitted.num_output_tokens
        self._queue.charge(tenant, service_class, OUTPUT_WEIGHT * wrong)
        if event.num_output_tokens:
            mean = self._mean_output.get(tenant, OUTPUT_TOKENS_GUESS)
            self._mean_output[tenant] = mean + _OUTPUT_MEMORY * (event.num_output_tokens - mean)

    def _leave_queue(self, request_id: str) -> None:
        item = self._queue.remove(request_id)
        if item is not None:
            self._forget(item)

    def _has_waiting(self, urgency: Urgency) -> bool:
        """Whether somebody is before a newcomer of this class."""
        own = urgency.service_class
        return len(self._queue) > 0 and any(
            self._queue.length_of(each) for each in ServiceClass if each.rank <= own.rank
        )

    def _has_room(self, event: RequestArrived, now: float) -> bool:
        if not self._placer.num_places:
            return True  # whoever is asked next says that there is no worker
        is_batch = event.urgency.is_batch
        running = self._running.total() if is_batch else self._running[ServiceClass.INTERACTIVE]
        if running >= self._placer.num_places:
            return False
        if not is_batch and not self._is_shared and not self._options.refuses_late:
            return True
        outlook = self._placer.outlook(event.num_prompt_tokens, now)
        if outlook is None:
            return True
        if is_batch and self._running[ServiceClass.INTERACTIVE] and outlook.step_s > self._options.tpot_target_s:
            return False
        backlog_s = BATCH_BACKLOG_S if is_batch else SHARED_BACKLOG_S
        return outlook.backlog_s <= min(backlog_s, self._options.ttft_target_s / 2)

    def _must_be_in_time(self, event: RequestArrived) -> bool:
        return self._options.refuses_late and not event.urgency.is_batch and not event.is_continued

    def _predicted_wait_s(self, event: RequestArrived, now: float) -> float:
        """The longest of what the cost model says of the prompts ahead, and what their pace and that of places say."""
        urgency = event.urgency
        num_ahead = self._queue.num_ahead(event.tenant, urgency)
        queued, num_queued = self._queued_tokens[urgency.service_class], self._queue.length_of(urgency.service_class)
        tokens_ahead = num_ahead * queued / num_queued if num_queued else 0.0
        outlook = self._placer.outlook(event.num_prompt_tokens, now)
        model_s = 0.0
        if outlook is not None:
            token_s = outlook.prefill_s / max(1, event.num_prompt_tokens) / max(1, outlook.num_prefill_workers)
            model_s = outlook.backlog_s + tokens_ahead * token_s
        prefill_s = self._prefill_pace.seconds_for(tokens_ahead + self._prompt_tokens[urgency.service_class])
        is_full = self._running.total() >= self._placer.num_places
        place_s = self._place_pace.seconds_for(num_ahead + 1) if is_full else 0.0
        return max(model_s, prefill_s, place_s)

    def _expected_output(self, event: RequestArrived | RequestPlaced) -> float:
        return min(event.max_tokens, self._mean_output.get(event.tenant, OUTPUT_TOKENS_GUESS))

    def _service(self, event: RequestArrived | RequestPlaced) -> float:
        return event.num_prompt_tokens + OUTPUT_WEIGHT * self._expected_output(event)

    def _pushed_out(self, event: RequestArrived, now: float) -> RefuseRequest:
        if not event.urgency.is_batch:  # which waits for what is left over, and grows no pool
            self._placer.refused(event, now)
        message = f"{self._options.max_queued_requests} requests wait already."
        return RefuseRequest(event.request_id, message, Refusal.QUEUE_FULL, self._predicted_wait_s(event, now))

    def _late(
        self, event: RequestArrived, wait_s: float, own_s: float, retry_after_s: float, now: float
    ) -> RefuseRequest:
        target_s = self._options.ttft_target_s
        why = f"it would take {wait_s:.1f} s of waiting and {own_s:.1f} s of its own."
        if own_s > target_s:
            retry_after_s = NEVER_RETRY_S
            why = f"with nobody before it this prompt of {event.num_prompt_tokens} tokens takes {own_s:.1f} s."
        else:
            self._placer.refused(event, now)
        message = f"The first token cannot come within the server's target of {target_s:g} s: {why}"
        return RefuseRequest(event.request_id, message, Refusal.TTFT_TARGET, retry_after_s)
