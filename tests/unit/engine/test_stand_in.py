"""While the scheduler is away requests wait as they would there, and are placed under the same limits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from engine import scheduler_client
from engine.scheduler_client import SchedulerClient
from kvcache.errors import OverloadedError, RateLimitError, UnavailableError
from scheduler.admission import AdmissionControl, AdmissionOptions
from scheduler.controller import ClusterController
from scheduler.delivery import Delivery
from scheduler.events import Command, Event, PrefillDone, RequestArrived, RequestEnded, WorkerRegistered
from scheduler.placement import PlacementOptions
from scheduler.types import ClusterSnapshot, Placement
from scheduler.urgency import ORDINARY, ServiceClass, Urgency
from tests.builders import make_worker
from tests.unit.engine.skipping_loop import SkippingLoop

LEAST_LOADED = PlacementOptions("least_loaded")
BATCH = Urgency(ServiceClass.BATCH)
NUM_PLACES = 4


class Scheduler:
    """Admission and the real controller. It can stand still, as a whole, and come back without a memory."""

    def __init__(self, options: AdmissionOptions) -> None:
        self._options = options
        self._num_starts = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self._one_by_one = asyncio.Lock()  # calls are handled in their order, as an actor does
        self.is_away = False
        self.restart()

    def restart(self) -> None:
        self._num_starts += 1
        self._controller = ClusterController(options=LEAST_LOADED, epoch=self._num_starts)
        self._admission = AdmissionControl(self._controller, self._options)
        self._delivery = Delivery(self._admission)
        self._admission.handle(WorkerRegistered(replace(make_worker("x"), max_num_seqs=NUM_PLACES)), 0.0)

    async def handle(self, events: Sequence[Event], asker: str = "") -> list[list[Command]]:
        async with self._one_by_one:
            await self.gate.wait()
        if self.is_away:
            raise UnavailableError("restarting")
        return self._delivery.handle(events, asker, asyncio.get_running_loop().time())

    async def snapshot(self) -> ClusterSnapshot:
        await self.gate.wait()
        if self.is_away:
            raise UnavailableError("restarting")
        return self._admission.snapshot()

    @property
    def in_flight(self) -> int:
        (worker,) = self._admission.snapshot().workers
        return worker.requests_in_flight

    @property
    def num_queued(self) -> int:
        snapshot = self._admission.snapshot()
        return snapshot.queued_interactive + snapshot.queued_batch


@dataclass(slots=True)
class Clients:
    """Requests that run until they are ended here."""

    client: SchedulerClient
    tasks: dict[str, asyncio.Task[Placement]] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)  # in the order in which they were placed

    def ask(self, *names: str, urgency: Urgency = ORDINARY) -> None:
        for name in names:
            self.tasks[name] = asyncio.create_task(self._place(RequestArrived(name, 5, 3, urgency=urgency)))

    async def _place(self, request: RequestArrived) -> Placement:
        placement = await self.client.place(request)
        self.running.append(request.request_id)
        return placement

    def end(self, *names: str) -> None:
        for name in names:
            self.running.remove(name)
            self.client.tell(PrefillDone(name))
            self.client.tell(RequestEnded(name, 3, 3))

    async def end_all(self) -> None:
        """One after the other, and those that are placed by it."""
        while self.running or not all(task.done() for task in self.tasks.values()):
            self.end(*self.running[:1])
            await asyncio.sleep(0.1)


Scenario = Callable[[Clients, Scheduler], Awaitable[None]]


def run(scenario: Scenario, options: AdmissionOptions = AdmissionOptions()) -> None:  # noqa: B008  frozen
    """At its end the scheduler knows of nothing."""

    async def main() -> None:
        scheduler = Scheduler(options)
        client = SchedulerClient(scheduler, LEAST_LOADED, options, asyncio.get_running_loop().time)
        await client.start()
        await scenario(Clients(client), scheduler)
        await asyncio.sleep(20)
        assert not client.is_scheduler_away
        assert (scheduler.in_flight, scheduler.num_queued) == (0, 0)
        await client.stop()

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(main())


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number:02}" for number in range(count)]


@pytest.mark.parametrize("urgency", [ORDINARY, BATCH])
def test_a_scheduler_that_stands_still_for_a_moment_empties_no_queue_onto_the_workers(urgency: Urgency) -> None:
    async def scenario(clients: Clients, scheduler: Scheduler) -> None:
        clients.ask(*names("r", 50), urgency=urgency)
        await asyncio.sleep(0.2)
        scheduler.gate.clear()
        clients.ask("newcomer", urgency=urgency)
        await asyncio.sleep(0.6)
        assert clients.client.is_scheduler_away
        assert clients.running == names("r", NUM_PLACES)
        assert [clients.client.position(name) for name in ("r04", "r49", "newcomer")] == [0, 45, 46]
        scheduler.gate.set()
        await clients.end_all()
        assert all(task.done() for task in clients.tasks.values())

    run(scenario)


def test_who_waits_is_placed_in_order_while_the_scheduler_is_away_and_after_it() -> None:
    order: list[str] = []

    async def scenario(clients: Clients, scheduler: Scheduler) -> None:
        clients.ask(*names("r", 12))
        await asyncio.sleep(0.2)
        scheduler.is_away = True
        await asyncio.sleep(1.0)
        for expected in ("r04", "r05", "r06"):
            order.append(clients.running[0])
            clients.end(clients.running[0])
            await asyncio.sleep(0.1)
            assert clients.running[-1] == expected
        scheduler.is_away = False
        await asyncio.sleep(1.0)
        assert not clients.client.is_scheduler_away
        assert scheduler.in_flight == NUM_PLACES
        assert clients.client.position("r07") == 0
        while clients.running:
            order.append(clients.running[0])
            clients.end(clients.running[0])
            await asyncio.sleep(0.1)

    run(scenario)
    assert order == names("r", 12)


def test_a_restarted_scheduler_is_asked_for_what_still_waits() -> None:
    async def scenario(clients: Clients, scheduler: Scheduler) -> None:
        clients.ask(*names("r", 8))
        await asyncio.sleep(0.2)
        scheduler.restart()
        await asyncio.sleep(2.0)
        assert clients.running == names("r", NUM_PLACES)
        assert (scheduler.in_flight, scheduler.num_queued) == (NUM_PLACES, 4)
        await clients.end_all()

    run(scenario)


def test_newcomers_wait_behind_others_while_the_scheduler_is_away_and_the_queue_has_an_end() -> None:
    async def scenario(clients: Clients, scheduler: Scheduler) -> None:
        scheduler.is_away = True
        clients.ask(*names("r", NUM_PLACES + 3))
        await asyncio.sleep(0.1)
        clients.ask("too-many")
        await asyncio.sleep(0.1)
        with pytest.raises(OverloadedError, match="3 requests wait already"):
            clients.tasks["too-many"].result()
        assert clients.running == names("r", NUM_PLACES)
        scheduler.is_away = False
        await clients.end_all()

    run(scenario, AdmissionOptions(max_queued_requests=3))


def test_what_becomes_late_while_the_scheduler_is_away_is_told_so() -> None:
    async def scenario(clients: Clients, scheduler: Scheduler) -> None:
        clients.ask(*names("r", NUM_PLACES))
        await asyncio.sleep(0.1)
        scheduler.is_away = True
        clients.ask("late")
        await asyncio.sleep(1.2)
        with pytest.raises(RateLimitError, match="first token"):
            clients.tasks["late"].result()
        scheduler.is_away = False
        await clients.end_all()

    run(scenario, AdmissionOptions(ttft_target_s=1.0, refuses_late=True))


def test_time_goes_on_for_what_changes_hands() -> None:
    """It waits 0.6 s in the scheduler's line, as long in the gateway's, and in the scheduler's again."""

    async def scenario(clients: Clients, scheduler: Scheduler) -> None:
        clients.ask(*names("r", NUM_PLACES), "late")
        await asyncio.sleep(0.6)
        scheduler.is_away = True
        await asyncio.sleep(0.6)
        scheduler.is_away = False
        await asyncio.sleep(0.6)
        assert not clients.client.is_scheduler_away
        assert not clients.tasks["late"].done()
        await asyncio.sleep(0.3)
        with pytest.raises(RateLimitError, match="first token"):
            clients.tasks["late"].result()
        await clients.end_all()

    run(scenario, AdmissionOptions(ttft_target_s=2.0, refuses_late=True))


def test_what_a_slow_scheduler_placed_holds_a_place_for_whoever_stands_in() -> None:
    async def scenario(clients: Clients, scheduler: Scheduler) -> None:
        await asyncio.sleep(0.1)
        scheduler.gate.clear()
        clients.ask("timed-out")
        await asyncio.sleep(0.3)
        clients.ask("answered-late")
        await asyncio.sleep(0.25)
        assert clients.running == ["timed-out"]
        scheduler.gate.set()
        await asyncio.sleep(0.01)
        assert clients.client.is_scheduler_away
        clients.ask(*names("r", NUM_PLACES))
        await asyncio.sleep(0.1)
        assert clients.running == ["timed-out", "answered-late", "r00", "r01"]
        await clients.end_all()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_client, "SNAPSHOT_INTERVAL_S", 2.0)
        run(scenario)


def test_who_gives_up_while_the_scheduler_is_away_leaves_the_queue() -> None:
    async def scenario(clients: Clients, scheduler: Scheduler) -> None:
        clients.ask(*names("r", NUM_PLACES + 2))
        await asyncio.sleep(0.1)
        scheduler.is_away = True
        await asyncio.sleep(1.0)
        clients.tasks.pop("r04").cancel()
        await asyncio.sleep(0.1)
        clients.end("r00")
        await asyncio.sleep(0.1)
        assert clients.running[-1] == "r05"
        scheduler.is_away = False
        await clients.end_all()

    run(scenario)


def test_a_scheduler_that_stands_still_is_noticed_though_nobody_comes() -> None:
    async def scenario(clients: Clients, scheduler: Scheduler) -> None:
        clients.ask(*names("r", NUM_PLACES + 1))
        await asyncio.sleep(0.1)
        scheduler.gate.clear()
        clients.end("r00")
        await asyncio.sleep(6.0)
        assert clients.running[-1] == "r04"
        scheduler.gate.set()
        await clients.end_all()

    run(scenario)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_scheduler_does_every_request_is_placed_once_and_ends(seed: int) -> None:
    rng = random.Random(seed)

    async def disturb(scheduler: Scheduler, until_s: float) -> None:
        now = asyncio.get_running_loop().time
        while now() < until_s:
            await asyncio.sleep(rng.uniform(0.0, 2.0))
            match rng.choice(["still", "away", "restart"]):
                case "still":
                    scheduler.gate.clear()
                case "away":
                    scheduler.is_away = True
                case "restart":
                    scheduler.restart()
            await asyncio.sleep(rng.uniform(0.0, 1.5))
            scheduler.is_away = False
            scheduler.gate.set()

    async def scenario(clients: Clients, scheduler: Scheduler) -> None:
        disturbing = asyncio.create_task(disturb(scheduler, 20.0))
        for number in range(200):
            clients.ask(f"r{number}", urgency=rng.choice([ORDINARY, BATCH]))
            await asyncio.sleep(rng.uniform(0.0, 0.2))
            if clients.running and rng.random() < 0.8:
                clients.end(rng.choice(clients.running))
        await disturbing
        await clients.end_all()
        assert all(task.result() for task in clients.tasks.values())

    run(scenario)
