"""Pools whose caches differ: the handoff converts, and the answers are those of pools that do not."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvcache.transfer.port_choice import PortName
from scheduler.batching import BatchLimits
from scheduler.types import WorkerRole
from tests.cluster import LocalCluster, TinyCheckpoint, greedily, local_cluster
from tests.integration.ports import Came

pytestmark = pytest.mark.integration

LENGTHS = (1, 7, 8, 16, 33, 64, 100, 200)
NUM_TOKENS = 12
CHUNKED = BatchLimits(max_num_seqs=8, max_num_batched_tokens=48)


def specs_of(checkpoint: TinyCheckpoint, prefill: dict[str, object], decode: dict[str, object]):  # type: ignore[no-untyped-def]
    return {
        WorkerRole.PREFILL: replace(checkpoint.spec, **prefill),
        WorkerRole.DECODE: replace(checkpoint.spec, **decode),
    }


@pytest.mark.parametrize(
    ("prefill", "decode", "port"),
    [
        (8, 64, "grpc"),
        (64, 8, "grpc"),
        (8, 64, "shm"),
        (64, 8, "shm"),
        (16, 32, "grpc"),
        (32, 16, "shm"),
        (16, 48, "shm"),
    ],
)
def test_pools_with_other_blocks_give_the_reference(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, prefill: int, decode: int, port: PortName
) -> None:
    specs = specs_of(checkpoint, {"block_size": prefill}, {"block_size": decode})
    came = Came(monkeypatch)

    async def scenario() -> None:
        async with local_cluster(
            checkpoint, prefill=1, decode=1, specs=specs, limits=CHUNKED, kv_transfer_port=port
        ) as cluster:
            prompts = [checkpoint.prompt(length, seed=length) for length in LENGTHS]
            await asyncio.gather(*(cluster.check_greedy(prompt, NUM_TOKENS) for prompt in prompts))
            load = cluster.load("decode-0")
            assert load.transfer_failures == ()
            assert load.prompt_tokens_computed == 0
            sent = sum(specs[WorkerRole.PREFILL].handoff_bytes(len(prompt)) for prompt in prompts)
            assert load.transfer_bytes == sent
        came.check_only(port)

    asyncio.run(scenario())


@pytest.mark.parametrize(("prefill", "decode"), [(8, 32), (32, 8)])
def test_only_what_is_missing_is_sent(checkpoint: TinyCheckpoint, prefill: int, decode: int) -> None:
    """The second prompt goes on where the first ended; the blocks that both pools hold are not sent again."""
    specs = specs_of(checkpoint, {"block_size": prefill}, {"block_size": decode})

    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=1, specs=specs) as cluster:
            prompt = checkpoint.prompt(150)
            await cluster.check_greedy(prompt[:100], NUM_TOKENS)
            first = cluster.load("decode-0").transfer_bytes
            await cluster.check_greedy(prompt, NUM_TOKENS)
            held = 100 // decode * decode
            spec = specs[WorkerRole.PREFILL]
            expected = (spec.num_blocks_for(150) - held // prefill) * spec.block_bytes
            assert cluster.load("decode-0").transfer_bytes - first == expected

    asyncio.run(scenario())


async def answers(cluster: LocalCluster, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    done = await asyncio.gather(*(cluster.complete(prompt, greedily(NUM_TOKENS)) for prompt in prompts))
    return [completion.token_ids for completion in done]


@pytest.mark.parametrize(
    ("prefill", "decode", "port"),
    [
        ("float32", "int8", "grpc"),
        ("int8", "float32", "shm"),
        ("float32", "bfloat16", "shm"),
        ("bfloat16", "fp8", "grpc"),
    ],
)
def test_pools_with_other_kv_dtypes_answer_to_what_rounding_costs(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, prefill: str, decode: str, port: PortName
) -> None:
    """An untrained model's logits lie close together: one token that rounding turns over changes all after it. By
    chance one token in 281 would agree."""
    prompts = [checkpoint.prompt(length, seed=length) for length in LENGTHS]
    came = Came(monkeypatch)

    async def scenario() -> float:
        specs = specs_of(checkpoint, {"dtype": prefill, "block_size": 16}, {"dtype": decode, "block_size": 32})
        async with local_cluster(checkpoint, prefill=1, decode=1, specs=specs, kv_transfer_port=port) as cluster:
            found = await answers(cluster, prompts)
            assert cluster.load("decode-0").transfer_failures == ()
        expected = [checkpoint.greedy(prompt, NUM_TOKENS) for prompt in prompts]
        pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
        return sum(ours == theirs for ours, theirs in pairs) / len(pairs)

    assert asyncio.run(scenario()) > 0.3
    came.check_only(port)


@pytest.mark.parametrize("sent", ["int8", "fp8"])
def test_kv_that_is_rounded_for_the_way_takes_less_of_it(checkpoint: TinyCheckpoint, sent: str) -> None:
    prompts = [checkpoint.prompt(length, seed=length) for length in LENGTHS]

    async def scenario() -> None:
        specs = specs_of(checkpoint, {"block_size": 16}, {"block_size": 32})
        async with local_cluster(checkpoint, prefill=1, decode=1, specs=specs, kv_transfer_dtype=sent) as cluster:
            found = await answers(cluster, prompts)
            load = cluster.load("decode-0")
            on_the_wire = replace(specs[WorkerRole.PREFILL], dtype=sent)
            assert load.transfer_bytes == sum(on_the_wire.handoff_bytes(len(prompt)) for prompt in prompts)
            assert load.transfer_failures == ()
            assert cluster.load("prefill-0").transfers_compressed == len(prompts)
        expected = [checkpoint.greedy(prompt, NUM_TOKENS) for prompt in prompts]
        assert sum(ours[0] == theirs[0] for ours, theirs in zip(found, expected, strict=True)) == len(prompts)

    asyncio.run(scenario())


def test_a_link_that_was_measured_to_be_slow_gets_rounded_kv_and_a_quick_one_does_not(
    checkpoint: TinyCheckpoint,
) -> None:
    async def scenario() -> None:
        async with local_cluster(checkpoint, prefill=1, decode=2, kv_transfer_dtype="auto") as cluster:
            wire = cluster.workers["prefill-0"].wire
            for seed in range(2):  # one on each decode worker; this worker's own rate is known then
                await cluster.check_greedy(checkpoint.prompt(100, seed=seed), NUM_TOKENS)
            assert wire.num_compressed == 0
            slow, quick = (cluster.workers[f"decode-{index}"].address for index in range(2))
            wire.note_link(slow, 1 << 20, 1000.0)
            wire.note_link(quick, 1 << 30, 0.001)
            for seed in range(2, 6):
                await cluster.complete(checkpoint.prompt(100, seed=seed), greedily(NUM_TOKENS))
            placed = [placement.decode.address for placement in cluster.scheduler.placements[2:]]
            assert wire.num_compressed == placed.count(slow) > 0
            assert quick in placed

    asyncio.run(scenario())
