"""Load that turns, mixes or is too much: roles that follow it, batch work beside chats, and what is shed (F16)."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import psutil
import pytest

from scheduler.types import WorkerRole
from tests.cluster import TinyCheckpoint
from tests.e2e.load import Load, make_client, percentile
from tests.e2e.server import RunningServer, serving
from tests.e2e.traffic import SMALL, saved_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# So little room that a few clients are a heavy load.
NARROW = ("--max-num-seqs", "2", "--max-num-batched-tokens", "16")
FLIP_TIMEOUT_S = 110.0  # a worker keeps its role for 60 s at least


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return saved_tiny(tmp_path_factory.mktemp("tiny"))


async def load_until_prefill_workers_are(server: RunningServer, load: Load, count: int) -> None:
    """Keeps the load up until the roles have followed it. Every request must end well."""
    load.know_answers()
    deadline = time.monotonic() + FLIP_TIMEOUT_S
    async with make_client() as client:
        while len(await asyncio.to_thread(server.workers, WorkerRole.PREFILL)) != count:
            assert time.monotonic() < deadline, f"{server.cluster().pools}"
            await load.closed(client, 6, time.monotonic() + 1)
        await load.closed(client, 6, time.monotonic() + 1)  # in the new roles too
    assert {outcome.status for outcome in load.outcomes} == {200}


def test_roles_follow_a_load_that_turns_and_no_request_is_lost(tiny: TinyCheckpoint) -> None:
    """Short prompts with long answers, then the reverse; two of three workers do what there is more of."""
    flags = ("--roles", "auto", "--prefill-workers", "2", "--decode-workers", "1", *NARROW, "--drain-timeout", "1")
    with serving(str(tiny.path), *flags, *SMALL, expected_workers=3) as server:
        processes = {each.info.process_id for each in server.cluster().workers}
        answers, prompts = Load(server.url, tiny, 10, 200), Load(server.url, tiny, 480, 1)
        asyncio.run(load_until_prefill_workers_are(server, answers, 1))
        asyncio.run(load_until_prefill_workers_are(server, prompts, 2))
        assert {each.info.process_id for each in server.cluster().workers} == processes, "one was started again"


@pytest.fixture
def narrow(tiny: TinyCheckpoint) -> Iterator[RunningServer]:
    with serving(str(tiny.path), *NARROW, "--max-queued-requests", "40", *SMALL, expected_workers=2) as server:
        yield server


def test_batch_work_fills_what_chats_leave_and_gives_way_to_them(narrow: RunningServer, tiny: TinyCheckpoint) -> None:
    """A chat never waits for the batch jobs before it, which go on whenever there is none."""
    jobs = Load(narrow.url, tiny, 10, 200, {"service_tier": "flex"})
    chats = Load(narrow.url, tiny, 10, 20)
    for load in (jobs, chats):
        load.know_answers()

    async def scenario() -> list[int]:
        """How many jobs ended while each chat was under way."""
        overtaken = []
        async with make_client() as client:
            batch = [asyncio.create_task(jobs.ask(client)) for _ in range(30)]
            await asyncio.wait(batch, return_when=asyncio.FIRST_COMPLETED)
            for _ in range(8):
                before = sum(job.done() for job in batch)
                await chats.ask(client)
                overtaken.append(sum(job.done() for job in batch) - before)
                await asyncio.sleep(0.1)
            assert not all(job.done() for job in batch), "there was too little batch work"
            await asyncio.gather(*batch)
        return overtaken

    overtaken = asyncio.run(scenario())
    assert {outcome.status for outcome in (*jobs.outcomes, *chats.outcomes)} == {200}
    assert max(overtaken) <= 2, "more than those that ran already"
    preemptions = sum(each.load.preemptions for each in narrow.cluster().workers)
    print(f"{preemptions} preemptions; chats took {[round(each.seconds, 3) for each in chats.outcomes]} s")
    assert preemptions > 0, "no batch job gave its place"


OVERLOAD_S = 60.0


def test_twice_the_capacity_is_shed_at_once_and_the_rest_is_served(narrow: RunningServer, tiny: TinyCheckpoint) -> None:
    """F16, with deadlines far above what it takes; the figures themselves are printed."""
    calm, flood, after = (Load(narrow.url, tiny, 20, 40) for _ in range(3))
    calm.know_answers()

    async def scenario() -> float:
        async with make_client() as client:
            await calm.closed(client, 2, time.monotonic() + 2)
            calm.outcomes.clear()
            began_s = time.monotonic()
            await calm.closed(client, 8, began_s + 10)
            capacity = len(calm.outcomes) / (time.monotonic() - began_s)
            await flood.open(client, 2 * capacity, time.monotonic() + OVERLOAD_S / 6)
            grown_from = psutil.Process(narrow.process.pid).memory_info().rss
            await flood.open(client, 2 * capacity, time.monotonic() + OVERLOAD_S)
            grown = (psutil.Process(narrow.process.pid).memory_info().rss - grown_from) / (1 << 20)
            for _ in range(20):
                await after.ask(client)
        served = [each for each in flood.outcomes if each.status == 200]
        shed = [each for each in flood.outcomes if each.status != 200]
        seconds = flood.outcomes[-1].sent_s - flood.outcomes[0].sent_s
        goodput = len(served) / seconds / capacity
        told_s = [each.seconds for each in shed]
        print(f"capacity {capacity:.1f}/s; {len(flood.outcomes)} sent, {len(shed)} shed, goodput {goodput:.2f}")
        print(f"shed by reason: {Counter(each.limit for each in shed)}")
        print(f"shed p50/p99 {percentile(told_s, 0.5):.3f}/{percentile(told_s, 0.99):.3f} s; memory {grown:+.1f} MiB")
        print(f"afterwards p99 {percentile([each.seconds for each in after.outcomes], 0.99):.3f} s")
        assert {each.status for each in shed} <= {429, 503} and shed
        assert all(each.retry_after and int(each.retry_after) >= 1 for each in shed)
        assert goodput >= 0.6 and percentile(told_s, 0.5) < 1.0 and grown < 60
        return capacity

    asyncio.run(scenario())
    assert {each.status for each in after.outcomes} == {200}
    narrow.wait_until_idle(timeout_s=10)
    assert httpx.get(f"{narrow.url}/ready", timeout=10).status_code == 200
