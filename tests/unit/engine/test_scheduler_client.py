"""The gateway's side of the scheduler: one call per tick, and no failure that lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest

from engine import scheduler_client
from engine.scheduler_client import SchedulerClient, SchedulerPort
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
    WorkerRegistered,
)
from scheduler.placement import PlacementOptions
from scheduler.types import ClusterSnapshot, Placement, WorkerAddress, WorkerInfo, WorkerRole
from scheduler.urgency import ServiceClass, Urgency
from tests.builders import make_worker
from tests.unit.engine.skipping_loop import SkippingLoop

LEAST_LOADED = PlacementOptions("least_loaded")
AnyScheduler = TypeVar("AnyScheduler", bound=SchedulerPort)


class ScriptedScheduler:
    """Places everything on one worker, unless told to fail."""

    def __init__(self) -> None:
        self.batches: list[list[Event]] = []
        self.is_full = False  # new requests wait
        self.mail: list[Command] = []
        self.failures: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.called = asyncio.Event()

    async def handle(self, events: Sequence[Event], asker: str = "") -> list[list[Command]]:
        self.batches.append(list(events))
        self.called.set()
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        mail, self.mail = self.mail, []
        return [*(self._answer(event) for event in events), mail]

    async def snapshot(self) -> ClusterSnapshot:
        return ClusterSnapshot(missing=("decode-0",))

    def _answer(self, event: Event) -> list[Command]:
        if not isinstance(event, RequestArrived):
            return []
        if event.num_prompt_tokens > 1000:
            return [RefuseRequest(event.request_id, "no worker")]
        if self.is_full:
            return [RequestQueued(event.request_id, 4)]
        return [place(event.request_id)]


def place(request_id: str, worker_id: str = "decode-0") -> PlaceRequest:
    return PlaceRequest(Placement(request_id, WorkerAddress(worker_id, "here:1"), None))


async def queued(client: SchedulerClient, scheduler: ScriptedScheduler, name: str) -> asyncio.Task[Placement]:
    """A request that waits in the scheduler's queue."""
    scheduler.is_full = True
    placing = asyncio.create_task(client.place(arrival(name)))
    await until(lambda: client.position(name) is not None)
    return placing


class Calls:
    """A scheduler whose calls wait until the test answers them, in whatever order. Its cluster has one place."""

    def __init__(self) -> None:
        self.batches: list[list[Event]] = []
        self._answers: list[asyncio.Future[list[list[Command]]]] = []
        self.pages = asyncio.Event()
        self.pages.set()

    async def handle(self, events: Sequence[Event], asker: str = "") -> list[list[Command]]:
        self.batches.append(list(events))
        self._answers.append(asyncio.get_running_loop().create_future())
        return await self._answers[-1]

    async def snapshot(self) -> ClusterSnapshot:
        await self.pages.wait()
        controller = ClusterController(options=LEAST_LOADED, epoch=1)
        controller.handle(WorkerRegistered(replace(make_worker("decode-0"), max_num_seqs=1)), 0.0)
        return controller.snapshot()

    async def answer(self, number: int, *commands: Command) -> None:
        """The client has its next calls out when it returns."""
        self._answers[number].set_result([list(commands)])
        await asyncio.sleep(0.02)

    async def lose(self, *numbers: int) -> None:
        """Calls that were under way when the scheduler ended."""
        for number in numbers:
            self._answers[number].set_exception(UnavailableError("restarting"))
        await asyncio.sleep(0.02)

    def told_of(self, request_id: str, since: int = 0) -> list[type[Event]]:
        """Since a call."""
        told = [event for batch in self.batches[since:] for event in batch]
        return [type(event) for event in told if _id_of(event) == request_id]


def _id_of(event: Event) -> str:
    if isinstance(event, RequestPlaced):
        return event.placement.request_id
    assert isinstance(event, RequestArrived | RequestEnded)
    return event.request_id


class RestartableScheduler:
    """The real controller, which can be away, stand still, and come back without a memory."""

    def __init__(self, *workers: WorkerInfo) -> None:
        self.workers = workers
        self.is_away = False
        self.gate = asyncio.Event()
        self.gate.set()
        self._controller = ClusterController(options=LEAST_LOADED, epoch=1)
        self.heard: list[Event] = []
        self.register()

    async def handle(self, events: Sequence[Event], asker: str = "") -> list[list[Command]]:
        await self.gate.wait()
        if self.is_away:
            raise UnavailableError("restarting")
        self.heard += events
        return [self._controller.handle(event, 0.0) for event in events]

    async def snapshot(self) -> ClusterSnapshot:
        if self.is_away:
            raise UnavailableError("restarting")
        return self._controller.snapshot()

    def restart(self) -> None:
        self.is_away = False
        self._controller = ClusterController(options=LEAST_LOADED, epoch=2)

    def register(self) -> None:
        for worker in self.workers:
            assert self._controller.handle(WorkerRegistered(worker), 0.0) == []

    def in_flight(self) -> dict[str, int]:
        return {worker.info.worker_id: worker.requests_in_flight for worker in self._controller.snapshot().workers}


Scenario = Callable[[SchedulerClient, AnyScheduler], Awaitable[None]]


def run(scenario: Scenario[AnyScheduler], scheduler: AnyScheduler) -> None:
    async def main() -> None:
        client = SchedulerClient(scheduler, LEAST_LOADED)
        await client.start()
        try:
            await scenario(client, scheduler)
        finally:
            await client.stop()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_client, "RETRY_INTERVAL_S", 0.0)
    monkeypatch.setattr(scheduler_client, "POLL_INTERVAL_S", 0.001)
    monkeypatch.setattr(scheduler_client, "ASK_INTERVAL_S", 0.002)
    monkeypatch.setattr(scheduler_client, "SNAPSHOT_INTERVAL_S", 0.001)


def arrival(name: str, num_prompt_tokens: int = 5) -> RequestArrived:
    return RequestArrived(name, num_prompt_tokens, max_tokens=3)


def test_what_comes_while_a_call_is_under_way_travels_in_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_client, "CALLS_AT_ONCE", 1)

    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        scheduler.gate.clear()
        first = asyncio.create_task(client.place(arrival("a")))
        await scheduler.called.wait()
        others = [asyncio.create_task(client.place(arrival(name))) for name in "bcd"]
        await asyncio.sleep(0)
        client.tell(PrefillDone("z"))
        scheduler.gate.set()
        placements = await asyncio.gather(first, *others)
        assert [placement.request_id for placement in placements] == ["a", "b", "c", "d"]
        assert scheduler.batches == [[arrival("a")], [arrival("b"), arrival("c"), arrival("d"), PrefillDone("z")]]

    run(scenario, ScriptedScheduler())


def test_a_call_does_not_wait_for_the_one_before_it() -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        scheduler.gate.clear()
        placing = []
        for name in "abc":
            placing.append(asyncio.create_task(client.place(arrival(name))))
            await asyncio.sleep(0.01)
        assert scheduler.batches == [[arrival("a")], [arrival("b")]]
        scheduler.gate.set()
        await asyncio.gather(*placing)
        assert scheduler.batches[2:] == [[arrival("c")]]

    run(scenario, ScriptedScheduler())


def test_a_refusal_is_raised_and_the_books_are_closed() -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        with pytest.raises(UnavailableError, match="no worker"):
            await client.place(arrival("a", num_prompt_tokens=5000))
        await client.place(arrival("b"))
        assert RequestEnded("a") in [event for batch in scheduler.batches for event in batch]

    run(scenario, ScriptedScheduler())


def test_a_scheduler_that_is_away_is_told_later_what_it_must_know() -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        scheduler.failures = [UnavailableError("restarting")]
        client.tell(RequestEnded("old"))
        with pytest.raises(UnavailableError, match="does not answer"):
            await client.place(arrival("a"))
        await until(lambda: not client.is_scheduler_away)
        await client.place(arrival("b"))
        later = [event for batch in scheduler.batches[1:] for event in batch]
        assert later[0] == RequestEnded("old")
        assert arrival("a") not in later

    run(scenario, ScriptedScheduler())


def test_a_bug_in_the_scheduler_fails_its_batch_and_nothing_after_it(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        scheduler.failures = [KeyError("bug")]
        with pytest.raises(TwinpoolError, match="KeyError"):
            await client.place(arrival("a"))
        assert (await client.place(arrival("b"))).request_id == "b"

    run(scenario, ScriptedScheduler())
    assert "could not take" in caplog.text


def test_a_cancelled_request_is_taken_off_the_books() -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        scheduler.gate.clear()
        placing = asyncio.create_task(client.place(arrival("a")))
        await scheduler.called.wait()
        placing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await placing
        scheduler.gate.set()
        await client.place(arrival("b"))
        assert RequestEnded("a") in scheduler.batches[1]

    run(scenario, ScriptedScheduler())


def test_no_answer_is_an_error_and_no_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_client, "PLACE_TIMEOUT_S", 0.01)

    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        scheduler.gate.clear()
        with pytest.raises(UnavailableError, match="does not answer"):
            await client.place(arrival("a"))

    run(scenario, ScriptedScheduler())


def test_it_is_ready_while_there_are_workers_that_the_policy_places_on() -> None:
    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        assert not client.is_ready
        scheduler.workers = (make_worker("d", WorkerRole.DECODE),)
        scheduler.register()
        await until(lambda: len(client.cluster.workers) == 1)
        assert not client.is_ready
        scheduler.workers = (make_worker("p", WorkerRole.PREFILL),)
        scheduler.register()
        await until(lambda: client.is_ready)
        await client.place(arrival("a"))

    run(scenario, RestartableScheduler())


# While the scheduler is away


def run_skipping(scenario: Scenario[AnyScheduler], scheduler: AnyScheduler) -> None:
    async def main() -> None:
        client = SchedulerClient(scheduler, LEAST_LOADED, clock=asyncio.get_running_loop().time)
        await client.start()
        await scenario(client, scheduler)
        await client.stop()

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(main())


def test_a_scheduler_that_gives_no_answer_is_waited_for_half_a_second() -> None:
    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        now = asyncio.get_running_loop().time
        scheduler.gate.clear()
        started_s = now()
        await client.place(arrival("a"))
        assert now() - started_s == pytest.approx(0.5, abs=0.01)
        started_s = now()
        await client.place(arrival("b"))
        assert now() == started_s

    run_skipping(scenario, RestartableScheduler(make_worker("x")))


def test_each_request_waits_half_a_second_from_when_it_was_asked_for() -> None:
    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        now = asyncio.get_running_loop().time

        async def waited_s(name: str, begin_s: float) -> float:
            await asyncio.sleep(begin_s)
            started_s = now()
            await client.place(arrival(name))
            return now() - started_s

        await client.place(arrival("answered"))
        await asyncio.sleep(0.1)
        scheduler.gate.clear()
        waits_s = await asyncio.gather(waited_s("a", 0.0), waited_s("b", 0.3))
        assert waits_s == pytest.approx([0.5, 0.5], abs=0.01)

    run_skipping(scenario, RestartableScheduler(make_worker("x")))


def test_what_a_slow_scheduler_placed_after_all_is_its_own_and_it_hears_of_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler_client, "SNAPSHOT_INTERVAL_S", 2.0)  # until then it counts as away

    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        scheduler.gate.clear()
        first = asyncio.create_task(client.place(arrival("timed-out")))
        await asyncio.sleep(0.3)
        second = asyncio.create_task(client.place(arrival("answered-late")))
        await first
        scheduler.gate.set()
        await second
        assert client.is_scheduler_away
        for name in ("timed-out", "answered-late"):
            client.tell(RequestEnded(name))
        await asyncio.sleep(5)
        assert not client.is_scheduler_away
        assert scheduler.in_flight() == {"x": 0}

    run_skipping(scenario, RestartableScheduler(make_worker("x")))


def test_a_restarted_scheduler_that_lacks_a_worker_is_asked_again_after_ten_seconds() -> None:
    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        now = asyncio.get_running_loop().time
        scheduler.workers = scheduler.workers[:1]
        scheduler.restart()
        scheduler.register()
        started_s = now()
        await asyncio.sleep(9.9)
        assert client.is_scheduler_away
        while client.is_scheduler_away:  # noqa: ASYNC110  as in until
            await asyncio.sleep(0.01)
        assert now() - started_s == pytest.approx(10.0, abs=0.1)

    run_skipping(scenario, RestartableScheduler(make_worker("x"), make_worker("y")))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  the client is told nothing of its own state
            await asyncio.sleep(0.001)


async def running(client: SchedulerClient, calls: Calls, name: str) -> None:
    """A request that holds the one place."""
    placing = asyncio.create_task(client.place(arrival(name)))
    await asyncio.sleep(0.02)
    await calls.answer(0, place(name))
    await placing


async def wait_out(client: SchedulerClient, calls: Calls) -> None:
    """The scheduler stands still so long that somebody stands in for it; when it goes on, a page is answered first."""
    calls.pages.clear()
    await until(lambda: client.is_scheduler_away)
    calls.pages.set()
    await asyncio.sleep(0.02)
    assert not client.is_scheduler_away


@pytest.mark.parametrize("stale", [place("a", "elsewhere"), RefuseRequest("a", "sorry")])
def test_an_answer_from_before_somebody_stood_in_is_not_heard_afterwards(stale: Command) -> None:
    async def scenario(client: SchedulerClient, calls: Calls) -> None:
        await running(client, calls, "before-it")
        placing = asyncio.create_task(client.place(arrival("a")))
        await asyncio.sleep(0.02)
        await wait_out(client, calls)
        await calls.answer(1, stale)
        assert not placing.done()
        assert calls.told_of("a") == [RequestArrived, RequestEnded, RequestArrived]
        await calls.answer(3, place("a"))
        assert (await placing).decode.worker_id == "decode-0"

    run_skipping(scenario, Calls())


def test_what_was_decided_of_one_that_waits_before_somebody_stood_in_is_not_heard_afterwards() -> None:
    async def scenario(client: SchedulerClient, calls: Calls) -> None:
        await running(client, calls, "before-it")
        placing = asyncio.create_task(client.place(arrival("a")))
        await asyncio.sleep(0.02)
        await calls.answer(1, RequestQueued("a", 0))
        assert calls.batches[2] == []
        other = asyncio.create_task(client.place(arrival("other")))
        await wait_out(client, calls)
        await calls.answer(2, place("a", "elsewhere"))
        assert not placing.done()
        await calls.answer(4, place("a"), place("other"))
        assert [placement.decode.worker_id for placement in (await placing, await other)] == ["decode-0", "decode-0"]

    run_skipping(scenario, Calls())


def test_what_was_not_sent_before_somebody_stood_in_is_asked_for_once_afterwards() -> None:
    async def scenario(client: SchedulerClient, calls: Calls) -> None:
        await running(client, calls, "before-it")
        for name in ("one", "two"):  # as many as are under way at once
            client.tell(RequestEnded(name))
            await asyncio.sleep(0.02)
        placing = asyncio.create_task(client.place(arrival("a")))
        await wait_out(client, calls)
        assert calls.told_of("a") == []
        await calls.answer(1)
        assert calls.told_of("a") == [RequestEnded, RequestArrived]
        await calls.answer(3, place("a"))
        await placing

    run_skipping(scenario, Calls())


def test_of_calls_that_are_lost_together_no_placement_is_told_after_its_end() -> None:
    async def scenario(client: SchedulerClient, calls: Calls) -> None:
        await running(client, calls, "a")
        await wait_out(client, calls)
        client.tell(RequestEnded("a"))
        await asyncio.sleep(0.02)
        assert calls.told_of("a", since=1) == [RequestPlaced, RequestEnded]
        await calls.lose(1, 2)
        assert calls.told_of("a", since=3) == [RequestEnded]

    run_skipping(scenario, Calls())


def test_requests_are_placed_from_the_last_snapshot_and_know_of_each_other() -> None:
    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        first = await client.place(arrival("a"))
        scheduler.is_away = True
        others = [await client.place(arrival(name)) for name in "bcd"]
        placed = [placement.decode.worker_id for placement in (first, *others)]
        assert sorted(placed) == ["x", "x", "y", "y"]
        assert client.is_scheduler_away

    run(scenario, RestartableScheduler(make_worker("x"), make_worker("y")))


def test_a_scheduler_that_stands_still_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_client, "PLACE_TIMEOUT_S", 0.01)

    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        scheduler.gate.clear()
        assert (await client.place(arrival("a"))).decode.worker_id == "x"
        scheduler.gate.set()
        await until(lambda: not client.is_scheduler_away and scheduler.in_flight() == {"x": 1})
        client.tell(RequestEnded("a"))
        await until(lambda: scheduler.in_flight() == {"x": 0})

    run(scenario, RestartableScheduler(make_worker("x")))


def test_a_restarted_scheduler_is_asked_again_when_it_has_its_workers_and_is_told_what_runs() -> None:
    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        for name in "ab":
            await client.place(arrival(name))
        scheduler.is_away = True
        await client.place(arrival("c"))
        client.tell(RequestEnded("a"))
        scheduler.restart()
        await client.place(arrival("d"))
        assert client.is_scheduler_away
        assert [worker.info.worker_id for worker in client.cluster.workers] == ["x"]
        scheduler.register()
        await until(lambda: not client.is_scheduler_away)
        await until(lambda: scheduler.in_flight() == {"x": 3})
        for name in "bcd":
            client.tell(RequestEnded(name))
        await until(lambda: scheduler.in_flight() == {"x": 0})

    run(scenario, RestartableScheduler(make_worker("x")))


def test_a_restart_that_nobody_saw_is_noticed_by_the_epoch() -> None:
    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        await client.place(arrival("a"))
        scheduler.restart()
        scheduler.register()
        await until(lambda: scheduler.in_flight() == {"x": 1})
        assert not client.is_scheduler_away

    run(scenario, RestartableScheduler(make_worker("x")))


def test_a_restarted_scheduler_is_told_whose_requests_run_and_of_which_class() -> None:
    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        flex = Urgency(ServiceClass.BATCH, priority=3)
        await client.place(replace(arrival("a"), tenant="night", urgency=flex))
        scheduler.restart()
        scheduler.register()
        await until(lambda: scheduler.in_flight() == {"x": 1})
        (told,) = (event for event in scheduler.heard if isinstance(event, RequestPlaced))
        assert (told.tenant, told.urgency) == ("night", flex)

    run(scenario, RestartableScheduler(make_worker("x")))


def test_workers_that_do_not_come_back_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_client, "RELEARN_S", 0.01)

    async def scenario(client: SchedulerClient, scheduler: RestartableScheduler) -> None:
        scheduler.workers = scheduler.workers[:1]
        scheduler.restart()
        scheduler.register()
        await until(lambda: len(client.cluster.workers) == 1)
        assert (await client.place(arrival("a"))).decode.worker_id == "x"

    run(scenario, RestartableScheduler(make_worker("x"), make_worker("y")))


# While a request waits in the scheduler's queue


def test_a_placement_that_comes_late_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nobody tells the scheduler anything meanwhile, and later than any first answer may come."""
    monkeypatch.setattr(scheduler_client, "ASK_INTERVAL_S", 60.0)
    monkeypatch.setattr(scheduler_client, "PLACE_TIMEOUT_S", 0.01)

    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        placing = await queued(client, scheduler, "a")
        assert client.position("a") == 4
        await asyncio.sleep(0.03)
        scheduler.mail = [place("a")]
        assert (await placing).request_id == "a"
        assert client.position("a") is None
        assert not client.is_scheduler_away

    run(scenario, ScriptedScheduler())


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Refusal.UNAVAILABLE, UnavailableError),
        (Refusal.QUEUE_FULL, OverloadedError),
        (Refusal.TTFT_TARGET, RateLimitError),
    ],
)
def test_a_refusal_that_comes_late_says_why_and_until_when(reason: Refusal, kind: type[OverloadedError]) -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        placing = await queued(client, scheduler, "a")
        scheduler.mail = [RefuseRequest("a", "sorry", reason, 2.5)]
        with pytest.raises(OverloadedError, match="sorry") as refusal:
            await placing
        assert (type(refusal.value), refusal.value.retry_after_s) == (kind, 2.5)
        assert client.position("a") is None

    run(scenario, ScriptedScheduler())


def test_one_that_waits_is_asked_for_again_as_its_answer_may_be_lost() -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        placing = await queued(client, scheduler, "a")
        scheduler.is_full = False
        assert (await placing).request_id == "a"

    run(scenario, ScriptedScheduler())


def test_those_that_wait_are_placed_here_when_the_scheduler_goes_away() -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        placing = await queued(client, scheduler, "a")
        scheduler.failures = [UnavailableError("restarting")]
        with pytest.raises(UnavailableError, match="no worker that was known"):
            await placing
        assert client.is_scheduler_away

    run(scenario, ScriptedScheduler())


def test_one_that_gives_up_waiting_is_taken_off_the_books() -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        placing = await queued(client, scheduler, "a")
        placing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await placing
        scheduler.is_full = False
        await client.place(arrival("b"))
        told = [event for batch in scheduler.batches for event in batch]
        assert RequestEnded("a") in told
        assert arrival("a") not in told[told.index(RequestEnded("a")) :]
        assert client.position("a") is None

    run(scenario, ScriptedScheduler())
