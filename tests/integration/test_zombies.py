"""Workers that stop and come back (F6), and workers that are slow beyond a lease (F11): no wrong token, no leak."""

from __future__ import annotations

import asyncio

import pytest

from kvcache.errors import TransferFault
from kvcache.lease import BlockLease, LeaseState
from scheduler.types import WorkerRole
from tests.cluster import TinyCheckpoint, greedily, local_cluster
from tests.leaks import until
from tests.worker_process import worker_process

pytestmark = pytest.mark.integration

NUM_TOKENS = 12
PROMPT_TOKENS = 300
ZOMBIE = "a-prefill"  # the first to be chosen
LEASE_TTL_S = 0.8


def test_the_late_words_of_a_stopped_prefill_worker_are_fenced(checkpoint: TinyCheckpoint) -> None:
    """It is stopped with half of its KV verified and some more on the way, and comes back after two leases."""
    prompt = checkpoint.prompt(PROMPT_TOKENS)

    async def scenario() -> None:
        async with (
            local_cluster(checkpoint, prefill=1, decode=1, lease_ttl_s=LEASE_TTL_S) as cluster,
            worker_process(cluster, ZOMBIE, WorkerRole.PREFILL, LEASE_TTL_S) as zombie,
        ):
            gate = cluster.hold_transfers("decode-0", after_chunks=28)
            request = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            await gate.holding()
            await zombie.stop()
            gate.open_for_others()
            assert (await request).token_ids == checkpoint.greedy(prompt, NUM_TOKENS)  # by another worker
            assert cluster.failures("decode-0")[TransferFault.EXPIRED.value] == 1
            assert TransferFault.STALE_EPOCH.value not in cluster.failures("decode-0")
            await asyncio.sleep(LEASE_TTL_S)  # the second lease; its term has to pass, there is nothing to wait for
            assert zombie.state == "T"
            cluster.workers["decode-0"].manager.check_idle()

            gate.open()  # what it had sent arrives now
            await zombie.go_on()
            await until(
                lambda: cluster.failures("decode-0").get(TransferFault.STALE_EPOCH.value, 0) >= 1, "the late words"
            )
            cluster.workers["decode-0"].manager.check_idle()
            for seed in (1, 2):  # both prefill workers are of use again
                await cluster.check_greedy(checkpoint.prompt(40, seed=seed), NUM_TOKENS)
            used = [placed.prefill.worker_id for placed in cluster.scheduler.placements if placed.prefill]
            assert used[:2] == [ZOMBIE, "prefill-0"]
            assert set(used[2:]) == {ZOMBIE, "prefill-0"}
            await zombie.check_leaks()

    asyncio.run(scenario())


def test_what_a_stopped_prefill_worker_sends_itself_when_it_goes_on_is_fenced(checkpoint: TinyCheckpoint) -> None:
    """It is stopped between two chunks. What it had sent was verified by then, so nothing is on the way; what is
    refused later was sent after SIGCONT. Through shared memory, where a chunk that was put has been sent."""
    prompt = checkpoint.prompt(PROMPT_TOKENS)
    num_chunks = 28

    async def scenario() -> None:
        async with (
            local_cluster(checkpoint, prefill=1, decode=1, lease_ttl_s=LEASE_TTL_S, kv_transfer_port="shm") as cluster,
            worker_process(
                cluster, ZOMBIE, WorkerRole.PREFILL, LEASE_TTL_S, num_chunks, kv_transfer_port="shm"
            ) as zombie,
        ):
            decode = cluster.workers["decode-0"]
            request = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            await zombie.pauses()
            sent_bytes = num_chunks * checkpoint.spec.layer_block_bytes
            await until(lambda: decode.transfers.bytes_under_way == sent_bytes, "all that was sent to be verified")
            await zombie.stop()
            assert (await request).token_ids == checkpoint.greedy(prompt, NUM_TOKENS)  # by another worker
            assert cluster.failures("decode-0") == {TransferFault.EXPIRED.value: 1}
            await asyncio.sleep(LEASE_TTL_S)  # the second lease; its term has to pass, there is nothing to wait for
            decode.manager.check_idle()
            num_received = decode.load().transfer_bytes

            zombie.end_pause()  # which it cannot hear before it goes on
            assert zombie.state == "T"
            assert cluster.failures("decode-0") == {TransferFault.EXPIRED.value: 1}
            await zombie.go_on()
            await until(
                lambda: cluster.failures("decode-0").get(TransferFault.STALE_EPOCH.value, 0) == 1, "its next chunk"
            )
            assert decode.load().transfer_bytes == num_received
            decode.manager.check_idle()
            await cluster.check_greedy(prompt, NUM_TOKENS)  # from the decode worker's cache, which is as it was
            await zombie.check_leaks()

    asyncio.run(scenario())


def test_a_prefill_worker_that_stops_for_less_than_a_lease_costs_nothing(checkpoint: TinyCheckpoint) -> None:
    prompt = checkpoint.prompt(PROMPT_TOKENS)

    async def scenario() -> None:
        async with (
            local_cluster(checkpoint, decode=1) as cluster,
            worker_process(cluster, ZOMBIE, WorkerRole.PREFILL) as zombie,
        ):
            gate = cluster.hold_transfers("decode-0", after_chunks=28)
            request = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            await gate.holding()
            await zombie.stop()
            await asyncio.sleep(0.3)
            await zombie.go_on()
            gate.open()
            assert (await request).token_ids == checkpoint.greedy(prompt, NUM_TOKENS)
            assert cluster.failures("decode-0") == {}
            assert len(cluster.scheduler.placements) == 1
            await zombie.check_leaks()

    asyncio.run(scenario())


async def outlive(lease: BlockLease) -> None:
    """Three terms of a lease of 0.4 s, in which no chunk comes: heartbeats alone keep it."""
    await asyncio.sleep(1.2)
    assert lease.is_open
    assert lease.num_verified_tokens == 0


def test_heartbeats_keep_a_lease_while_a_step_of_the_prefill_worker_takes_longer(checkpoint: TinyCheckpoint) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, lease_ttl_s=0.4) as cluster:
            gate = cluster.hold_steps("prefill-0", lambda plan: True)
            request = asyncio.create_task(cluster.check_greedy(checkpoint.prompt(PROMPT_TOKENS), NUM_TOKENS))
            await gate.holding()
            (lease,) = cluster.workers["decode-0"].manager.leases
            await outlive(lease)
            gate.open()
            await request
            assert lease.state is LeaseState.COMMITTED
            assert cluster.failures("decode-0") == {}
            assert len(cluster.scheduler.placements) == 1

    asyncio.run(scenario())


def test_heartbeats_keep_a_lease_while_a_step_of_the_decode_worker_takes_longer(checkpoint: TinyCheckpoint) -> None:
    """Leases are opened between steps, so the step that is held is the first that finds one. The prefill worker is held
    too, or all would be there at once; what it sends arrives while the step goes on."""

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, lease_ttl_s=0.4) as cluster:
            leases = cluster.workers["decode-0"].manager.leases
            at_first = cluster.hold_steps("decode-0", lambda plan: True)
            first = asyncio.create_task(cluster.check_greedy(checkpoint.prompt(20), NUM_TOKENS))
            await at_first.holding()
            prefilling = cluster.hold_steps("prefill-0", lambda plan: True)
            second = asyncio.create_task(cluster.check_greedy(checkpoint.prompt(PROMPT_TOKENS), NUM_TOKENS))
            await until(lambda: cluster.load("decode-0").waiting == 1, "the second request to wait for its blocks")
            decoding = cluster.hold_steps("decode-0", lambda plan: len(leases) > 0)
            at_first.open()
            await decoding.holding()
            await prefilling.holding()
            (lease,) = leases
            await outlive(lease)
            prefilling.open()
            await until(lambda: lease.state is LeaseState.COMMITTED, "the KV to arrive during the step")
            decoding.open()
            await asyncio.gather(first, second)
            assert cluster.failures("decode-0") == {}
            assert len(cluster.scheduler.placements) == 2

    asyncio.run(scenario())


def test_a_decode_worker_that_takes_nothing_for_a_lease_is_given_up_and_its_half_is_never_read(
    checkpoint: TinyCheckpoint,
) -> None:
    prompt = checkpoint.prompt(PROMPT_TOKENS)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=2, decode=1, lease_ttl_s=0.4) as cluster:
            gate = cluster.hold_transfers("decode-0", after_chunks=2)
            request = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            await gate.holding()
            (lease,) = cluster.workers["decode-0"].manager.leases
            await until(lambda: not lease.is_open, "the prefill worker to give up")
            assert cluster.load("decode-0").generation_tokens == 0
            gate.open()
            assert (await request).token_ids == checkpoint.greedy(prompt, NUM_TOKENS)
            assert len(cluster.scheduler.placements) == 2

    asyncio.run(scenario())
