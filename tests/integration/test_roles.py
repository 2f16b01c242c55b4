"""Roles that follow the load, over real workers that obey: nobody who is served notices."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator

import pytest

from scheduler import controller, demand, planner
from scheduler.batching import BatchLimits
from scheduler.events import Tick
from scheduler.placement import PlacementOptions
from scheduler.types import DeviceProfile, WorkerRole
from tests.cluster import LocalCluster, TinyCheckpoint, local_cluster
from workers.membership import Membership

pytestmark = pytest.mark.integration

NARROW = BatchLimits(max_num_seqs=2, max_num_batched_tokens=16)  # so little room that a few clients are a heavy load
SMALL = DeviceProfile("small", gemm_gflop_s=0.5, read_gb_s=0.5, memory_bytes=1 << 30)
FLIP_TIMEOUT_S = 60.0
NUM_CLIENTS = 6


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hysteresis of seconds instead of a minute."""
    monkeypatch.setattr(planner, "MIN_STAY_S", 1.0)
    monkeypatch.setattr(planner, "HOLD_S", 0.5)
    monkeypatch.setattr(demand, "MEMORY_S", 2.0)
    monkeypatch.setattr(controller, "PLAN_INTERVAL_S", 0.25)


@contextlib.asynccontextmanager
async def reporting(cluster: LocalCluster) -> AsyncIterator[None]:
    """The workers register anew and report, as under Ray, and time passes in the scheduler."""
    memberships = []
    for worker in cluster.workers.values():
        memberships.append(Membership(worker, cluster.scheduler, lambda: None))
        await memberships[-1].register(worker.info(2, SMALL))

    async def tick() -> None:
        while True:
            await cluster.scheduler.handle([Tick()])
            await asyncio.sleep(0.1)

    tasks = [asyncio.create_task(each.send_heartbeats()) for each in memberships]
    tasks.append(asyncio.create_task(tick()))
    try:
        yield
        assert not [task for task in tasks if task.done()], "one has failed"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def num_prefill_workers(cluster: LocalCluster) -> int:
    snapshot = await cluster.scheduler.snapshot()
    return sum(each.info.role is WorkerRole.PREFILL for each in snapshot.workers)


async def load_until(cluster: LocalCluster, count: int, prompt_tokens: int, output_tokens: int) -> None:
    """Clients ask on until so many workers prefill, and once more. Every answer is compared with the reference."""
    deadline = time.monotonic() + FLIP_TIMEOUT_S

    async def ask_on(client: int) -> None:
        for number in itertools.count():
            is_there = await num_prefill_workers(cluster) == count
            salt = f"{prompt_tokens} {client} {number}".encode()
            await cluster.check_greedy(cluster.checkpoint.prompt(prompt_tokens, client), output_tokens, salt)
            if is_there:
                return
            assert time.monotonic() < deadline, "the roles do not follow the load"

    await asyncio.gather(*(ask_on(client) for client in range(NUM_CLIENTS)))


@pytest.mark.slow  # how soon the load shows depends on the machine; tests/unit/scheduler/test_three_devices.py is exact
@pytest.mark.usefixtures("hasty")
def test_roles_follow_a_load_that_turns_and_no_request_is_lost(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        options = PlacementOptions("cost", roles_follow_load=True)
        pools = {"prefill": 2, "decode": 1, "changes_role": True}
        async with (
            local_cluster(checkpoint, limits=NARROW, placement=options, **pools) as cluster,
            reporting(cluster),
        ):
            await load_until(cluster, 1, 10, 60)
            await load_until(cluster, 2, 400, 1)
            assert await num_prefill_workers(cluster) == 2

    asyncio.run(scenario())
