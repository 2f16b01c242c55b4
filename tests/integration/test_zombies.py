"""Workers that stop and come back (F6), and workers that are slow beyond a lease (F11): no wrong token, no leak."""

from __future__ import annotations

import asyncio

import pytest

from kvcache.errors import TransferFault
from kvcache.lease import BlockLease, LeaseState
from kvcache.transfer.port_choice import PortName
from scheduler.step_plan import StepPlan
from scheduler.types import WorkerRole
from tests.cluster import ROOMY, Completion, LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.integration.ports import BOTH_PORTS, Came, Opened
from tests.leaks import until
from tests.worker_process import WorkerProcess, worker_process

pytestmark = pytest.mark.integration

NUM_TOKENS = 12
PROMPT_TOKENS = 300
ZOMBIE = "a-prefill"  # the first to be chosen
LEASE_TTL_S = 0.8
LONG_ANSWER = 200  # tokens, of which a worker may compute some in vain


@pytest.mark.parametrize("port", BOTH_PORTS)
def test_the_late_words_of_a_stopped_prefill_worker_are_fenced(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, port: PortName
) -> None:
    """It is stopped with half of its KV verified and some more on the way, and comes back after two leases."""
    prompt = checkpoint.prompt(PROMPT_TOKENS)
    came = Came(monkeypatch)

    async def scenario() -> None:
        async with (
            local_cluster(checkpoint, prefill=1, decode=1, lease_ttl_s=LEASE_TTL_S, kv_transfer_port=port) as cluster,
            worker_process(cluster, ZOMBIE, WorkerRole.PREFILL, LEASE_TTL_S, kv_transfer_port=port) as zombie,
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
        came.check_only(port)

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


def test_a_prefill_worker_that_stops_for_less_than_a_lease_costs_nothing(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = checkpoint.prompt(PROMPT_TOKENS)
    came = Came(monkeypatch)

    async def scenario() -> None:
        async with (
            local_cluster(checkpoint, decode=1, kv_transfer_port="grpc") as cluster,
            worker_process(cluster, ZOMBIE, WorkerRole.PREFILL, kv_transfer_port="grpc") as zombie,
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
        came.check_only("grpc")

    asyncio.run(scenario())


DECODE_ZOMBIE = "a-decode"  # the first to be chosen


def last_chunk(plan: StepPlan) -> bool:
    return any(chunk.end == PROMPT_TOKENS for chunk in plan.chunks)


async def stop_in_the_middle(
    cluster: LocalCluster, zombie: WorkerProcess, num_tokens: int = NUM_TOKENS
) -> asyncio.Task[Completion]:
    """A request whose decode worker is stopped with some of its KV verified, for two leases. Returns with the prefill
    worker having given up, and all its blocks back."""
    prefill = cluster.workers["prefill-0"]
    gate = cluster.hold_steps("prefill-0", last_chunk)
    prompt = cluster.checkpoint.prompt(PROMPT_TOKENS)
    request = asyncio.create_task(cluster.complete(prompt, greedily(num_tokens)))
    await gate.holding()
    assert (await zombie.load()).blocks_leased > 0
    (lease,) = prefill.manager.leases
    await zombie.stop()
    gate.open()
    await until(lambda: not lease.is_open, "the prefill worker to give up")
    assert lease.state is LeaseState.ABORTED
    await asyncio.sleep(LEASE_TTL_S)  # the second lease; its term has to pass, there is nothing to wait for
    prefill.manager.check_idle()
    assert zombie.state == "T"
    assert not request.done()
    return request


@pytest.mark.parametrize("port", BOTH_PORTS)
def test_a_decode_worker_that_comes_back_after_two_leases_accepts_nothing_of_the_old_handoff(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, port: PortName
) -> None:
    opened = Opened(monkeypatch)

    async def scenario() -> None:
        async with (
            local_cluster(checkpoint, prefill=2, lease_ttl_s=LEASE_TTL_S, kv_transfer_port=port) as cluster,
            worker_process(cluster, DECODE_ZOMBIE, WorkerRole.DECODE, LEASE_TTL_S, kv_transfer_port=port) as zombie,
        ):
            request = await stop_in_the_middle(cluster, zombie)
            await zombie.go_on()
            expected = checkpoint.greedy(checkpoint.prompt(PROMPT_TOKENS), NUM_TOKENS)
            assert (await request).token_ids == expected
            load = await zombie.load()
            assert sum(dict(load.transfer_failures).values()) >= 1
            assert load.generation_tokens == NUM_TOKENS
            await zombie.check_leaks()
            assert min(opened.grpc, opened.shm) == 0
            assert (opened.grpc if port == "grpc" else opened.shm) >= 1

    asyncio.run(scenario())


def test_the_other_decode_worker_answers_while_one_is_stopped(checkpoint: TinyCheckpoint) -> None:
    """It is found to be lost by the pings of its client's connection, after some ten seconds."""

    async def scenario() -> None:
        async with (
            local_cluster(checkpoint, prefill=1, decode=1, lease_ttl_s=LEASE_TTL_S) as cluster,
            worker_process(cluster, DECODE_ZOMBIE, WorkerRole.DECODE, LEASE_TTL_S) as zombie,
        ):
            request = await stop_in_the_middle(cluster, zombie, LONG_ANSWER)
            expected = checkpoint.greedy(checkpoint.prompt(PROMPT_TOKENS), LONG_ANSWER)
            assert (await asyncio.wait_for(request, 40)).token_ids == expected  # without a time-out of pings it is 65
            assert zombie.state == "T"
            placed = [placement.decode.worker_id for placement in cluster.scheduler.placements]
            assert placed == [DECODE_ZOMBIE, "decode-0"]
            await zombie.go_on()
            await zombie.check_leaks()
            load = await zombie.load()
            assert sum(dict(load.transfer_failures).values()) >= 1
            # It may go on for some tokens before it hears that its client is gone, and ends there.
            assert load.generation_tokens < LONG_ANSWER / 2

    asyncio.run(scenario())


def test_a_decode_worker_that_stops_for_less_than_a_lease_costs_nothing(checkpoint: TinyCheckpoint) -> None:
    prompt = checkpoint.prompt(PROMPT_TOKENS)

    async def scenario() -> None:
        async with (
            local_cluster(checkpoint, prefill=1) as cluster,
            worker_process(cluster, DECODE_ZOMBIE, WorkerRole.DECODE) as zombie,
        ):
            gate = cluster.hold_steps("prefill-0", last_chunk)
            request = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            await gate.holding()
            await zombie.stop()
            gate.open()
            await asyncio.sleep(0.3)
            assert zombie.state == "T"
            assert not request.done()
            await zombie.go_on()
            assert (await request).token_ids == checkpoint.greedy(prompt, NUM_TOKENS)
            load = await zombie.load()
            assert (load.transfers, load.transfer_failures) == (1, ())
            assert load.transfer_bytes == checkpoint.spec.handoff_bytes(PROMPT_TOKENS)
            assert len(cluster.scheduler.placements) == 1
            await zombie.check_leaks()

    asyncio.run(scenario())


async def outlive(lease: BlockLease) -> None:
    """Three terms of a lease of 0.4 s, in which no chunk comes: heartbeats alone keep it."""
    await asyncio.sleep(1.2)
    assert lease.is_open
    assert lease.num_verified_tokens == 0


@pytest.mark.parametrize("port", BOTH_PORTS)
def test_heartbeats_keep_a_lease_while_a_step_of_the_prefill_worker_takes_longer(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, port: PortName
) -> None:
    opened = Opened(monkeypatch)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, lease_ttl_s=0.4, kv_transfer_port=port) as cluster:
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
            assert (opened.grpc, opened.shm) == ((1, 0) if port == "grpc" else (0, 1))

    asyncio.run(scenario())


def test_heartbeats_keep_a_lease_while_a_step_of_the_decode_worker_takes_longer(checkpoint: TinyCheckpoint) -> None:
    """The lease is opened, and KV arrives, while the step goes on. The prefill worker is held too, or all would be
    there at once."""

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, lease_ttl_s=0.4) as cluster:
            leases = cluster.workers["decode-0"].manager.leases
            decoding = cluster.hold_steps("decode-0", lambda plan: True)
            first = asyncio.create_task(cluster.check_greedy(checkpoint.prompt(20), NUM_TOKENS))
            await decoding.holding()
            prefilling = cluster.hold_steps("prefill-0", lambda plan: True)
            second = asyncio.create_task(cluster.check_greedy(checkpoint.prompt(PROMPT_TOKENS), NUM_TOKENS))
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


@pytest.mark.parametrize("port", BOTH_PORTS)
def test_a_decode_worker_that_takes_nothing_for_a_lease_is_given_up_and_its_half_is_never_read(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, port: PortName
) -> None:
    prompt = checkpoint.prompt(PROMPT_TOKENS)
    came = Came(monkeypatch)

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=2, decode=1, lease_ttl_s=0.4, kv_transfer_port=port) as cluster:
            gate = cluster.hold_transfers("decode-0", after_chunks=2)
            request = asyncio.create_task(cluster.complete(prompt, greedily(NUM_TOKENS)))
            await gate.holding()
            (lease,) = cluster.workers["decode-0"].manager.leases
            await until(lambda: not lease.is_open, "the prefill worker to give up")
            assert cluster.load("decode-0").generation_tokens == 0
            gate.open()
            assert (await request).token_ids == checkpoint.greedy(prompt, NUM_TOKENS)
            fits_a_step = PROMPT_TOKENS - lease.num_verified_tokens <= ROOMY.max_num_batched_tokens
            assert len(cluster.scheduler.placements) == (1 if fits_a_step else 2)
        came.check_only(port)

    asyncio.run(scenario())
