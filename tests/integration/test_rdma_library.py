"""The handoff through the real RDMA library, over TCP: between two processes, also when one of them stops or dies.

It needs the extra ``rdma`` and libibverbs. Over RDMA itself nothing of this has been run.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvcache.errors import ConfigError, TransferFault
from kvcache.transfer.remote_memory import MooncakeMemory, load_library
from scheduler.types import WorkerRole
from tests.cluster import LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.leaks import until
from tests.worker_process import worker_process

NUM_TOKENS = 10
PROMPT_TOKENS = 300
OTHER = "a-prefill"  # the first to be chosen
LEASE_TTL_S = 0.8
RDMA = {"kv_transfer_port": "rdma-tcp"}


def reason_to_skip() -> str:
    try:
        load_library()
    except ConfigError as error:
        return str(error)
    return ""


MISSING = reason_to_skip()
pytestmark = [pytest.mark.integration, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


def check_is_real(cluster: LocalCluster, worker_id: str = "decode-0") -> None:
    memory = cluster.workers[worker_id]._memory
    assert memory is not None and isinstance(memory.remote, MooncakeMemory)


def test_the_tokens_are_those_of_the_reference(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with (
            local_cluster(checkpoint, decode=1, **RDMA) as cluster,
            worker_process(cluster, OTHER, WorkerRole.PREFILL, **RDMA) as other,
        ):
            check_is_real(cluster)
            prompts = [checkpoint.prompt(60 + index, seed=index) for index in range(8)]
            await asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))
            assert cluster.load("decode-0").transfers == 8
            assert cluster.failures("decode-0") == {}
            await other.check_leaks()

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_sender_that_is_lost_half_way_costs_no_token(checkpoint: TinyCheckpoint, fault: str) -> None:
    """Its half is held back at the decode worker, so the rest lies in its memory when it stops or dies."""
    prompt = checkpoint.prompt(PROMPT_TOKENS)

    async def scenario() -> None:
        async with (
            local_cluster(checkpoint, prefill=1, decode=1, lease_ttl_s=LEASE_TTL_S, **RDMA) as cluster,
            worker_process(cluster, OTHER, WorkerRole.PREFILL, LEASE_TTL_S, **RDMA) as other,
        ):
            gate = cluster.hold_transfers("decode-0", after_chunks=28)
            request = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            await gate.holding()
            if fault == "killed":
                other.kill()
            else:
                await other.stop()
            gate.open_for_others()
            assert (await request).token_ids == checkpoint.greedy(prompt, NUM_TOKENS)  # by another worker
            gate.open()
            await cluster.check_greedy(checkpoint.prompt(40), NUM_TOKENS)
            if fault == "stopped":
                await other.go_on()
                await until(
                    lambda: cluster.failures("decode-0").get(TransferFault.STALE_EPOCH.value, 0) >= 1, "the late words"
                )
                await other.check_leaks()
            cluster.workers["decode-0"].manager.check_idle()

    asyncio.run(scenario())


def test_what_cannot_be_read_is_said_and_nothing_breaks() -> None:
    memory: Any = MooncakeMemory("127.0.0.1", "tcp")
    for session in ("127.0.0.1:1", "nonsense", ""):
        assert not memory.read(session, 1 << 20, 1 << 20, 4096)
