"""F14: the scheduler is killed; nobody who is served or asks to be notices."""

from __future__ import annotations

import asyncio
import time

import httpx
import psutil
import pytest

from tests.e2e.client import complete, complete_all, expected
from tests.e2e.reference import ReferenceCase
from tests.e2e.server import RunningServer, serving, wait_until

pytestmark = pytest.mark.e2e

LONG = {"max_tokens": 400, "ignore_eos": True}


def scheduler_process(server: RunningServer) -> psutil.Process:
    """Ray names an actor's process after its class."""
    (process,) = [
        child
        for child in server.process.children(recursive=True)
        if any("SchedulerActor" in part for part in child.cmdline())
    ]
    return process


async def stream_past_a_kill(server: RunningServer, cases: list[ReferenceCase]) -> float:
    """Kills the scheduler under running streams and asks for more; returns how long the first new one took."""
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        running = [asyncio.create_task(complete(client, case.prompt_token_ids, **LONG)) for case in cases]
        while sum(worker.load.running for worker in server.cluster().workers) < len(cases):  # noqa: ASYNC110  another process
            await asyncio.sleep(0.05)
        scheduler = scheduler_process(server)
        scheduler.kill()
        scheduler.wait(10)
        assert not any(task.done() for task in running), "the streams were to outlive the scheduler"
        started = time.monotonic()
        first = await complete(client, cases[0].prompt_token_ids, max_tokens=1)
        taken_s = time.monotonic() - started
        assert first == cases[0].output_token_ids[:1]
        assert [len(token_ids) for token_ids in await asyncio.gather(*running)] == [400] * len(cases)
    return taken_s


def test_killing_the_scheduler_fails_no_stream_and_no_new_request(reference: list[ReferenceCase]) -> None:
    cases = [case for case in reference if len(case.prompt_token_ids) < 100][:3]
    pools = ("--prefill-workers", "1", "--decode-workers", "2", "--placement-policy", "cost")
    with serving(*pools, expected_workers=3) as server:
        before = server.cluster().epoch
        undisturbed = asyncio.run(complete_all(server.url, cases, at_once=3))
        taken_s = asyncio.run(stream_past_a_kill(server, cases))
        # Generous for a loaded machine; a wait for Ray's restart, or for the workers to register, would be longer.
        assert taken_s < 10
        wait_until("a new scheduler that knows its workers", lambda: is_back(server, before), 30)
        assert asyncio.run(complete_all(server.url, cases, at_once=3)) == undisturbed == expected(cases)
        assert "placed by what was last known" in server.output.read_text()


def is_back(server: RunningServer, epoch_before: int) -> bool:
    cluster = server.cluster()
    return cluster.epoch != epoch_before and len(cluster.workers) == 3
