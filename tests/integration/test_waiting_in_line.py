"""Requests that wait in the scheduler's queue, over real workers and the HTTP application."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
from fastapi import FastAPI

from engine.api.app import create_app
from engine.metrics import Metrics
from engine.outputs import Origin
from engine.tenants import TenantKey, Tenants
from scheduler.admission import AdmissionOptions
from scheduler.batching import BatchLimits
from scheduler.tenants import Tenant
from scheduler.urgency import ServiceClass, Urgency
from tests.cluster import WAITING, LocalCluster, StepGate, TinyCheckpoint, greedily, local_cluster
from tests.leaks import until

TWO_PLACES = BatchLimits(max_num_seqs=2, max_num_batched_tokens=64)
BATCH = Urgency(ServiceClass.BATCH)
KEYS = {"authorization": "Bearer key-a"}


def make_app(cluster: LocalCluster) -> FastAPI:
    tenants = Tenants((Tenant("a"), Tenant("default")), (TenantKey("key-a", "a"),))
    metrics = Metrics("tiny", lambda: cluster.engine.cluster)
    return create_app(cluster.engine, tenants=tenants, metrics=metrics)


def connect(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=KEYS)


async def ask(client: httpx.AsyncClient, max_tokens: int = 8, **headers: str) -> httpx.Response:
    body: dict[str, Any] = {"prompt": [1, 2, 3, 4], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return await client.post("/v1/completions", json=body, headers=headers)


def test_everybody_waits_for_a_place_and_gets_the_right_tokens(checkpoint: TinyCheckpoint) -> None:
    """Ten times as many as there are places, of both classes and several tenants; the pools hand over."""

    async def main() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, limits=TWO_PLACES, admission=WAITING) as cluster:
            prompts = [checkpoint.prompt(20, seed) for seed in range(20)]
            tasks = [
                asyncio.create_task(
                    cluster.complete(
                        prompt, greedily(6), origin=Origin(f"t{seed % 3}", BATCH if seed % 2 else Urgency())
                    )
                )
                for seed, prompt in enumerate(prompts)
            ]
            for prompt, task in zip(prompts, tasks, strict=True):
                assert (await task).token_ids == checkpoint.greedy(prompt, 6)

    asyncio.run(main())


def test_a_client_can_ask_its_place_and_leave_the_line(checkpoint: TinyCheckpoint) -> None:
    async def main() -> None:
        async with local_cluster(checkpoint, colocated=1, limits=TWO_PLACES, admission=WAITING) as cluster:
            gate = StepGate(lambda plan: True)
            cluster.runners["colocated-0"].before_step = gate
            async with connect(make_app(cluster)) as client:
                first = [asyncio.create_task(ask(client)) for _ in range(2)]
                await until(lambda: len(cluster.scheduler.placements) == 2, "both places to be taken")
                waiting = []
                for name in ("job-1", "job-2"):
                    waiting.append(asyncio.create_task(ask(client, **{"x-request-id": name})))
                    await until(lambda: cluster.engine.queue_place("a", name) is not None, "it to begin")  # noqa: B023
                await until(lambda: _position(cluster, "job-2") == 1, "the second to know its place")
                assert (await client.get("/v1/queue/job-1")).json()["position"] == 0
                waiting[0].cancel()
                await until(lambda: _position(cluster, "job-2") == 0, "the second to move up")
                gate.open()
                assert [(await task).status_code for task in (*first, waiting[1])] == [200] * 3
                assert (await client.get("/v1/queue/job-2")).status_code == 404

    asyncio.run(main())


def _position(cluster: LocalCluster, name: str) -> int | None:
    place = cluster.engine.queue_place("a", name)
    return place.position if place is not None else None


def test_who_leaves_before_the_first_token_pays_for_a_prompt_that_had_its_place(checkpoint: TinyCheckpoint) -> None:
    async def main() -> None:
        async with local_cluster(checkpoint, colocated=1, limits=TWO_PLACES, admission=WAITING) as cluster:
            gate = StepGate(lambda plan: True)
            cluster.runners["colocated-0"].before_step = gate
            async with connect(make_app(cluster)) as client:
                tasks = [asyncio.create_task(ask(client, **{"x-request-id": f"job-{each}"})) for each in range(3)]
                await until(lambda: len(cluster.scheduler.placements) == 2, "both places to be taken")
                await until(lambda: _position(cluster, "job-2") == 0, "the third to wait")
                for task in reversed(tasks):  # the one that waits first, for it would get a place
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                gate.open()
                metrics = (await client.get("/metrics")).text
                (tokens,) = re.findall(r'tenant_tokens_total{kind="prompt",.*tenant="a"} (\S+)', metrics)
                assert float(tokens) == 2 * 4

    asyncio.run(main())


def test_what_is_shed_is_told_at_once(checkpoint: TinyCheckpoint) -> None:
    """Fault F16 in small: everybody beyond the queue hears when to come back, though the worker stands still."""

    async def main() -> None:
        admission = AdmissionOptions(max_queued_requests=4)
        async with local_cluster(checkpoint, colocated=1, limits=TWO_PLACES, admission=admission) as cluster:
            gate = StepGate(lambda plan: True)
            cluster.runners["colocated-0"].before_step = gate
            async with connect(make_app(cluster)) as client:
                served = [asyncio.create_task(ask(client)) for _ in range(6)]
                await until(lambda: len(cluster.scheduler.placements) == 2, "both places to be taken")
                for _ in range(20):
                    refused = await ask(client)
                    assert refused.status_code == 503
                    assert int(refused.headers["retry-after"]) >= 1
                assert not any(task.done() for task in served)
                gate.open()
                assert [(await task).status_code for task in served] == [200] * 6

    asyncio.run(main())
