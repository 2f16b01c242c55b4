"""Minutes of load with clients that leave and workers that are killed: every answer is whole and right."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field

import httpx
import pytest

from scheduler.types import WorkerRole
from tests.e2e.client import complete
from tests.e2e.reference import ReferenceCase
from tests.e2e.server import RunningServer, serving, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]
SEED = 20261122
NUM_REQUESTS = 150
KILL_AFTER = {40: WorkerRole.PREFILL, 80: WorkerRole.DECODE}  # number of requests sent → whose process is killed


@dataclass(slots=True)
class Outcome:
    wrong: list[str] = field(default_factory=list)
    completed: int = 0
    left: int = 0


def test_nothing_is_lost_or_leaked(reference: list[ReferenceCase]) -> None:
    short = [case for case in reference if len(case.prompt_token_ids) <= 200]
    with serving("--prefill-workers", "2", "--decode-workers", "2", expected_workers=4) as server:
        before = {worker.info.worker_id: worker.info.incarnation for worker in server.cluster().workers}
        outcome = asyncio.run(_load(server, short))
        wait_until("all workers are back", lambda: len(server.cluster().workers) == 4, timeout_s=120)
        after = {worker.info.worker_id: worker.info.incarnation for worker in server.cluster().workers}
    restarted = {worker_id for worker_id in before if before[worker_id] != after[worker_id]}
    assert len(restarted) == len(KILL_AFTER), "the kills did not happen"
    assert outcome.wrong == []
    assert outcome.left > 0
    assert outcome.completed + outcome.left == NUM_REQUESTS


async def _load(server: RunningServer, cases: list[ReferenceCase]) -> Outcome:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    outcome = Outcome()
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        tasks = []
        for number in range(NUM_REQUESTS):
            if number in KILL_AFTER:
                os.kill(server.workers(KILL_AFTER[number])[0].info.process_id, 9)
            patience_s = rng.uniform(0.05, 2.0) if rng.random() < 0.15 else None
            tasks.append(asyncio.create_task(_one(client, rng.choice(cases), patience_s, outcome)))
            await asyncio.sleep(rng.expovariate(1.5))
        await asyncio.gather(*tasks)
    return outcome


async def _one(client: httpx.AsyncClient, case: ReferenceCase, patience_s: float | None, outcome: Outcome) -> None:
    try:
        async with asyncio.timeout(patience_s):
            output = await complete(client, case.prompt_token_ids)
    except TimeoutError:
        outcome.left += 1
        return
    outcome.completed += 1
    if output != case.output_token_ids:
        outcome.wrong.append(case.name)
