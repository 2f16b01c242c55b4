"""A prefill worker killed with part of the KV sent (F2): what was verified is kept, and only the rest comes again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from kvcache.transfer.port_choice import PortName
from scheduler.types import WorkerRole
from tests.cluster import BLOCK_SIZE, TinyCheckpoint, greedily, local_cluster
from tests.integration.ports import BOTH_PORTS, Came
from tests.leaks import until
from tests.worker_process import worker_process

pytestmark = pytest.mark.integration

NUM_TOKENS = 12
PROMPT_TOKENS = 300
NUM_CHUNKS = 19 * 3  # blocks and layers
VICTIM = "a-prefill"  # the first to be chosen


@dataclass(frozen=True, slots=True)
class Outcome:
    verified_tokens: int  # when the worker was killed
    resumed_tokens: int
    prefills: list[str]  # the workers that were tried


async def complete_with_a_kill(
    checkpoint: TinyCheckpoint, chunks_sent: int, *, prefix_caching: bool = True, port: PortName = "auto"
) -> Outcome:
    """Kills a worker that has sent so much; checks that the answer is right and that only the rest comes again."""
    prompt = checkpoint.prompt(PROMPT_TOKENS)
    async with (
        local_cluster(checkpoint, prefill=1, decode=1, prefix_caching=prefix_caching, kv_transfer_port=port) as cluster,
        worker_process(cluster, VICTIM, WorkerRole.PREFILL, kv_transfer_port=port) as victim,
    ):
        gate = cluster.hold_transfers("decode-0", after_chunks=chunks_sent)
        request = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
        await gate.holding()
        manager = cluster.workers["decode-0"].manager
        (lease,) = manager.leases
        verified = lease.num_verified_tokens
        victim.kill()
        await until(lambda: not lease.is_open, "the decode worker to notice")
        gate.open()
        assert (await request).token_ids == checkpoint.greedy(prompt, NUM_TOKENS)

        load = cluster.load("decode-0")
        prefills = [placed.prefill.worker_id for placed in cluster.scheduler.placements if placed.prefill]
        missing = PROMPT_TOKENS - load.blocks_resumed * BLOCK_SIZE
        is_sent_again = len(prefills) > 1
        assert load.transfer_bytes == (checkpoint.spec.handoff_bytes(missing) if is_sent_again else 0)
        assert load.prompt_tokens_computed == (0 if is_sent_again else missing)
        if not prefix_caching:
            assert len(manager.pool.prefixes) == 0
        manager.check_integrity()
        return Outcome(verified, load.blocks_resumed * BLOCK_SIZE, prefills)


def test_killed_before_anything_was_sent_it_is_all_sent_by_another(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = Came(monkeypatch)
    outcome = asyncio.run(complete_with_a_kill(checkpoint, 0, port="grpc"))
    came.check_only("grpc")
    assert outcome == Outcome(0, 0, [VICTIM, "prefill-0"])


@pytest.mark.parametrize("port", BOTH_PORTS)
def test_killed_half_way_only_the_rest_is_sent_by_another(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, port: PortName
) -> None:
    came = Came(monkeypatch)
    outcome = asyncio.run(complete_with_a_kill(checkpoint, NUM_CHUNKS // 2, port=port))
    came.check_only(port)
    assert 80 <= outcome.verified_tokens <= PROMPT_TOKENS // 2
    assert outcome == Outcome(outcome.verified_tokens, outcome.verified_tokens, [VICTIM, "prefill-0"])


@pytest.mark.parametrize(("prefix_caching", "port"), [(True, "grpc"), (False, "auto")])
def test_killed_before_its_commit_the_rest_is_computed_in_place(
    checkpoint: TinyCheckpoint, prefix_caching: bool, port: PortName
) -> None:
    outcome = asyncio.run(complete_with_a_kill(checkpoint, NUM_CHUNKS, prefix_caching=prefix_caching, port=port))
    assert outcome == Outcome(PROMPT_TOKENS, PROMPT_TOKENS // BLOCK_SIZE * BLOCK_SIZE, [VICTIM])


def test_without_a_prefix_cache_a_long_rest_is_all_of_the_prompt(checkpoint: TinyCheckpoint) -> None:
    outcome = asyncio.run(complete_with_a_kill(checkpoint, NUM_CHUNKS // 2, prefix_caching=False))
    assert outcome == Outcome(outcome.verified_tokens, 0, [VICTIM, "prefill-0"])
    assert outcome.verified_tokens >= 80
