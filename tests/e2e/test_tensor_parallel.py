"""A worker of several ranks under Ray: the same tokens, and a group that is lost and comes back as one."""

from __future__ import annotations

import asyncio

import httpx
import psutil
import pytest

from scheduler.types import WorkerRole
from tests.e2e.client import complete, complete_all, expected
from tests.e2e.reference import ReferenceCase
from tests.e2e.server import RunningServer, serving, wait_until

pytestmark = pytest.mark.e2e


def test_prefill_on_one_rank_and_decode_on_three(reference: list[ReferenceCase]) -> None:
    """The default model has nine attention heads and three KV heads. A killed follower takes its group along, which
    comes back whole; what is left in the end ``serving`` checks."""
    with serving("--decode-tensor-parallel-size", "3", expected_workers=2) as server:
        short = [case for case in reference if len(case.prompt_token_ids) <= 200][-8:]
        assert asyncio.run(complete_all(server.url, short, at_once=8)) == expected(short)
        server.wait_until_idle()
        decode, prefill = (server.workers(role)[0] for role in (WorkerRole.DECODE, WorkerRole.PREFILL))
        assert (decode.info.tensor_parallel_size, prefill.info.tensor_parallel_size) == (3, 1)
        assert decode.load.transfers == len(short)
        _kill_a_follower(server)

        async def ask() -> tuple[int, ...]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                return await complete(client, short[0].prompt_token_ids)

        assert asyncio.run(ask()) == short[0].output_token_ids
        assert len(_followers(server)) == 2


def _kill_a_follower(server: RunningServer) -> None:
    killed = server.workers(WorkerRole.DECODE)[0].info
    group = [*_followers(server), psutil.Process(killed.process_id)]
    group[0].kill()
    _, alive = psutil.wait_procs(group, timeout=20)
    assert not alive, "a part of a group went on after a rank was lost"

    def is_back() -> bool:
        workers = server.workers(WorkerRole.DECODE)
        return bool(workers) and workers[0].info.incarnation != killed.incarnation

    wait_until("a new decode worker is registered", is_back, timeout_s=90)


def _followers(server: RunningServer) -> list[psutil.Process]:
    """Ray writes an actor's class into the title of its process."""
    return [child for child in server.process.children(recursive=True) if "FollowerActor" in " ".join(child.cmdline())]
