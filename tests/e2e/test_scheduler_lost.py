"""F14: the scheduler is killed; nobody who is served or asks to be notices."""

from __future__ import annotations

import asyncio
import time

import httpx
import psutil
import pytest

from tests.e2e.client import complete
from tests.e2e.server import RunningServer, serving, wait_until

pytestmark = pytest.mark.e2e

PROMPTS = tuple(tuple(range(1000 * number, 1000 * number + 20)) for number in (1, 2, 3))
NUM_TOKENS = 200


def scheduler_process(server: RunningServer) -> psutil.Process:
    """Ray names an actor's process after its class."""
    (process,) = [
        child
        for child in server.process.children(recursive=True)
        if any("SchedulerActor" in part for part in child.cmdline())
    ]
    return process


async def stream(client: httpx.AsyncClient, prompt: tuple[int, ...], num_tokens: int, salt: str) -> tuple[int, ...]:
    """``salt``: nothing is cached, so that every run computes the same."""
    return await complete(client, prompt, max_tokens=num_tokens, ignore_eos=True, cache_salt=salt)


async def undisturbed(server: RunningServer) -> list[tuple[int, ...]]:
    async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
        return await asyncio.gather(*(stream(client, prompt, NUM_TOKENS, "undisturbed") for prompt in PROMPTS))


async def past_a_kill(server: RunningServer) -> tuple[list[tuple[int, ...]], tuple[int, ...], float]:
    """The streams under which the scheduler is killed, a request after that, and its seconds."""
    async with httpx.AsyncClient(base_url=server.url, timeout=240) as client:
        running = [asyncio.create_task(stream(client, prompt, NUM_TOKENS, "killed")) for prompt in PROMPTS]
        while sum(worker.load.running for worker in server.cluster().workers) < len(PROMPTS):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        scheduler = scheduler_process(server)
        scheduler.kill()
        scheduler.wait(10)
        assert not any(task.done() for task in running), "the streams were to outlive the scheduler"
        started = time.monotonic()
        first = await stream(client, PROMPTS[0], 1, "new")
        taken_s = time.monotonic() - started
        return await asyncio.gather(*running), first, taken_s


def test_killing_the_scheduler_fails_no_stream_and_no_new_request() -> None:
    pools = ("--prefill-workers", "1", "--decode-workers", "2", "--placement-policy", "cost")
    with serving(*pools, expected_workers=3) as server:
        before = server.cluster().epoch
        reference = asyncio.run(undisturbed(server))
        streams, first, taken_s = asyncio.run(past_a_kill(server))
        assert streams == reference
        assert first == reference[0][:1]
        assert taken_s < 10  # generous for a loaded machine: without a stand-in it would fail, not wait
        wait_until("a new scheduler that knows its workers", lambda: is_back(server, before), 30)
        assert asyncio.run(undisturbed(server)) == reference
        output = server.output.read_text()
        assert "placed by what was last known" in output
        print(f"the first new request took {taken_s:.2f} s")


def is_back(server: RunningServer, epoch_before: int) -> bool:
    cluster = server.cluster()
    return cluster.epoch != epoch_before and len(cluster.workers) == 3
