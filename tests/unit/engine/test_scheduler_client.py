"""The gateway's side of the scheduler: one call per tick, and no failure that lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from engine import scheduler_client
from engine.scheduler_client import SchedulerClient
from kvcache.errors import TwinpoolError, UnavailableError
from scheduler.events import Command, Event, PlaceRequest, PrefillDone, RefuseRequest, RequestArrived, RequestEnded
from scheduler.types import ClusterSnapshot, Placement, WorkerAddress


class ScriptedScheduler:
    """Places everything on one worker, unless told to fail."""

    def __init__(self) -> None:
        self.batches: list[list[Event]] = []
        self.failures: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.called = asyncio.Event()

    async def handle(self, events: Sequence[Event]) -> list[list[Command]]:
        self.batches.append(list(events))
        self.called.set()
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        return [self._answer(event) for event in events]

    async def snapshot(self) -> ClusterSnapshot:
        return ClusterSnapshot(missing=("decode-0",))

    def _answer(self, event: Event) -> list[Command]:
        if not isinstance(event, RequestArrived):
            return []
        if event.num_prompt_tokens > 1000:
            return [RefuseRequest(event.request_id, "no worker")]
        return [PlaceRequest(Placement(event.request_id, WorkerAddress("decode-0", "here:1"), None))]


def run(scenario: Callable[[SchedulerClient, ScriptedScheduler], Awaitable[None]]) -> None:
    async def main() -> None:
        scheduler = ScriptedScheduler()
        client = SchedulerClient(scheduler)
        await client.start()
        try:
            await scenario(client, scheduler)
        finally:
            await client.stop()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_client, "RETRY_INTERVAL_S", 0.0)


def arrival(name: str, num_prompt_tokens: int = 5) -> RequestArrived:
    return RequestArrived(name, num_prompt_tokens, max_tokens=3)


def test_what_comes_while_a_call_is_under_way_travels_in_the_next_call() -> None:
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

    run(scenario)


def test_a_refusal_is_raised_and_the_books_are_closed() -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        with pytest.raises(UnavailableError, match="no worker"):
            await client.place(arrival("a", num_prompt_tokens=5000))
        await client.place(arrival("b"))
        assert RequestEnded("a") in [event for batch in scheduler.batches for event in batch]

    run(scenario)


def test_a_scheduler_that_is_away_is_told_later_what_it_must_know() -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        scheduler.failures = [UnavailableError("restarting")]
        client.tell(RequestEnded("old"))
        with pytest.raises(UnavailableError, match="restarting"):
            await client.place(arrival("a"))
        await client.place(arrival("b"))
        later = [event for batch in scheduler.batches[1:] for event in batch]
        assert later[0] == RequestEnded("old")
        assert arrival("a") not in later

    run(scenario)


def test_a_bug_in_the_scheduler_fails_its_batch_and_nothing_after_it(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        scheduler.failures = [KeyError("bug")]
        with pytest.raises(TwinpoolError, match="KeyError"):
            await client.place(arrival("a"))
        assert (await client.place(arrival("b"))).request_id == "b"

    run(scenario)
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

    run(scenario)


def test_no_answer_is_an_error_and_no_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_client, "PLACE_TIMEOUT_S", 0.01)

    async def scenario(client: SchedulerClient, scheduler: ScriptedScheduler) -> None:
        scheduler.gate.clear()
        with pytest.raises(UnavailableError, match="does not answer"):
            await client.place(arrival("a"))

    run(scenario)
