"""The controller as a Ray actor: wall clock in, controller, commands out. The only file here that imports ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvcache.errors import UnavailableError
from scheduler.admission import AdmissionControl, AdmissionOptions
from scheduler.controller import ClusterController
from scheduler.delivery import Delivery
from scheduler.events import Command, Event, Tick
from scheduler.garbage import collect_rarely
from scheduler.placement import PlacementOptions
from scheduler.types import ClusterSnapshot, WorkerSnapshot
from scheduler.wire import Answers, Events

ActorHandle = Any  # Ray's own type says nothing of the actor's methods
ACTOR_NAME = "scheduler"
TICK_INTERVAL_S = 0.5
PAGE_WORKERS = 64  # of a snapshot, in one call
STANDSTILL_S = 2.0  # calls come at least twice a second


class SchedulerActor:
    """One per cluster. Every caller sends the events of its tick in one call, for a call costs milliseconds.

    There is no timer: workers report twice a second, and each call lets the time pass.
    """

    def __init__(self, expected_workers: Sequence[str], options: PlacementOptions, admission: AdmissionOptions) -> None:
        controller = ClusterController(expected_workers, options=options, epoch=time.monotonic_ns())
        self._admission = AdmissionControl(controller, admission)
        self._delivery = Delivery(self._admission)
        self._ticked_at = 0.0
        collect_rarely()

    def handle(self, events: Sequence[Event], asker: str = "") -> Answers:
        """The commands that follow from each event, in order, and to an asker one list more (``Delivery.handle``)."""
        now = time.monotonic()
        commands = self._delivery.handle(events, asker, now)
        self._tick(now)  # after the heartbeats among the events
        return Answers(commands)

    def page(self, after: str) -> ClusterSnapshot:
        """``PAGE_WORKERS`` of the workers, those after an id; fewer: the last. Nobody waits long behind a page."""
        self._tick(time.monotonic())
        return self._admission.snapshot(after, PAGE_WORKERS)

    def _tick(self, now: float) -> None:
        """Time in which this process itself stood still says nothing of the workers: their heartbeats wait in line."""
        stood_still = now - self._ticked_at > STANDSTILL_S
        if now - self._ticked_at >= TICK_INTERVAL_S:
            self._ticked_at = now
            if not stood_still:
                self._delivery.handle((Tick(),), "", now)


class RayScheduler:
    """The scheduler as its clients see it; awaitable on any event loop."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    async def handle(self, events: Sequence[Event], asker: str = "") -> list[list[Command]]:
        """See ``Delivery.handle``.

        Raises:
            UnavailableError: the actor is away; Ray is restarting it.
        """
        try:
            commands: list[list[Command]] = await self._actor.handle.remote(Events(events), asker)
        except RayTaskError:
            raise  # the controller itself raised: a bug, and no reason to send the same again
        except RayError as error:
            raise UnavailableError("The scheduler is restarting.") from error
        return commands

    async def snapshot(self) -> ClusterSnapshot:
        """Page by page, with other calls between them.

        Raises:
            UnavailableError: as ``handle``.
        """
        pages = Pages()
        snapshot = None
        while snapshot is None:
            try:
                snapshot = pages.add(await self._actor.page.remote(pages.after))
            except RayError as error:
                raise UnavailableError("The scheduler is restarting.") from error
        return snapshot


class Pages:
    """Puts a snapshot together from its pages. One that was begun before a restart of the scheduler is begun anew."""

    def __init__(self) -> None:
        self.after = ""  # what to ask for
        self._workers: tuple[WorkerSnapshot, ...] = ()
        self._epoch = 0

    def add(self, page: ClusterSnapshot) -> ClusterSnapshot | None:
        """The page that was asked for; returns the whole when it was the last."""
        if self.after and page.epoch != self._epoch:
            self.after, self._workers = "", ()
            return None
        self._epoch = page.epoch
        self._workers += page.workers
        if len(page.workers) < PAGE_WORKERS:
            return replace(page, workers=self._workers)
        self.after = page.workers[-1].info.worker_id
        return None


def find_scheduler() -> RayScheduler:
    """For the other processes of the cluster."""
    return RayScheduler(ray.get_actor(ACTOR_NAME))


class PolledScheduler:
    """The scheduler for a thread that polls: it tells, it never waits, and it sees what was answered last."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor
        self._asked: ray.ObjectRef[ClusterSnapshot] | None = None  # the page
        self._pages = Pages()

    def tell(self, *events: Event) -> None:
        """Sends events. They are lost when the scheduler is away: what matters is told again."""
        self._actor.handle.remote(Events(events))

    def poll(self) -> ClusterSnapshot | None:
        """A view of the cluster that is new since the last call; asks for the next one, a page with each call."""
        if self._asked is None:
            self._asked = self._actor.page.remote(self._pages.after)
        if not ray.wait([self._asked], timeout=0)[0]:
            return None
        asked, self._asked = self._asked, None
        try:
            snapshot = self._pages.add(ray.get(asked))
        except RayError:
            return None
        if snapshot is not None:
            self._pages = Pages()
        return snapshot


def start_scheduler(
    expected_workers: Sequence[str], options: PlacementOptions, admission: AdmissionOptions
) -> ActorHandle:
    """Starts the actor; Ray restarts it when its process dies, and the workers register again.

    On the caller's node, since others may leave and with this one the caller ends. A soft affinity would not do: Ray
    places an actor that takes no resources on any node then.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    placed: Any = ray.remote(SchedulerActor).options(
        name=ACTOR_NAME, num_cpus=0, max_restarts=-1, scheduling_strategy=here
    )
    return placed.remote(tuple(expected_workers), options, admission)
