"""Prefixes that were evicted come back from memory and from files, with the same tokens, or not at all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from scheduler.types import TierLoad
from tests.cluster import BLOCK_SIZE, LocalCluster, TinyCheckpoint, local_cluster
from tests.leaks import until
from workers import kv_tiers

pytestmark = pytest.mark.integration

PROMPT_TOKENS = 100
WHOLE = PROMPT_TOKENS // BLOCK_SIZE * BLOCK_SIZE
NUM_TOKENS = 5
SMALL = {"num_blocks": 24}  # three prompts: the fourth evicts the first
COLOCATED = {"colocated": 1}
TWO_POOLS = {"prefill": 1, "decode": 1}
AMPLE = 1 << 30


def tiers(cluster: LocalCluster) -> dict[str, TierLoad]:
    return {tier.tier: tier for tier in cluster.load(computing(cluster)).tiers}


def saved_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*.kv"))


def computing(cluster: LocalCluster) -> str:
    return "colocated-0" if "colocated-0" in cluster.workers else "prefill-0"


async def evict_first(cluster: LocalCluster) -> tuple[int, ...]:
    """A prompt whose blocks are in a tier and nowhere else afterwards."""
    checkpoint = cluster.checkpoint
    first = checkpoint.prompt(PROMPT_TOKENS)
    for seed in range(6):
        assert await cluster.check_greedy(checkpoint.prompt(PROMPT_TOKENS, seed=seed), NUM_TOKENS) == 0
    kept = cluster.workers[computing(cluster)].tiers
    assert kept is not None
    await until(lambda: not kept._saving, "evicted blocks to be saved")
    return first


@pytest.mark.parametrize("pools", [COLOCATED, TWO_POOLS], ids=["colocated", "two pools"])
@pytest.mark.parametrize("host_bytes", [AMPLE, 0], ids=["memory", "files"])
def test_an_evicted_prefix_comes_back_with_the_same_tokens(
    checkpoint: TinyCheckpoint, tmp_path: Path, pools: dict[str, int], host_bytes: int
) -> None:
    async def scenario() -> None:
        folder = "" if host_bytes else str(tmp_path)
        async with local_cluster(
            checkpoint,
            **pools,
            **SMALL,
            kv_host_cache_bytes=host_bytes,
            kv_file_cache_dir=folder,
            kv_file_cache_bytes=AMPLE if folder else 0,
        ) as cluster:
            first = await evict_first(cluster)
            assert await cluster.check_greedy(first, NUM_TOKENS) == WHOLE
            assert tiers(cluster)["host" if host_bytes else "file"].hits == WHOLE // BLOCK_SIZE

    asyncio.run(scenario())


def test_files_serve_a_worker_that_was_started_again(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    files = {"kv_file_cache_dir": str(tmp_path), "kv_file_cache_bytes": AMPLE}

    async def scenario() -> None:
        async with local_cluster(checkpoint, **COLOCATED, **SMALL, **files) as cluster:
            first = await evict_first(cluster)
        async with local_cluster(checkpoint, **COLOCATED, **SMALL, **files) as cluster:
            assert await cluster.check_greedy(first, NUM_TOKENS) == WHOLE

    asyncio.run(scenario())


@pytest.mark.parametrize("seconds", [kv_tiers.FLUSH_TIMEOUT_S, 0.0], ids=["time to write", "no time"])
def test_what_was_in_memory_is_found_by_a_worker_that_was_started_again(
    checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(kv_tiers, "FLUSH_TIMEOUT_S", seconds)
    both = {"kv_host_cache_bytes": AMPLE, "kv_file_cache_dir": str(tmp_path), "kv_file_cache_bytes": AMPLE}

    async def scenario() -> None:
        async with local_cluster(checkpoint, **COLOCATED, **SMALL, **both) as cluster:
            first = await evict_first(cluster)
            assert tiers(cluster)["host"].num_bytes > 0
            assert saved_in(tmp_path) == []
        assert bool(saved_in(tmp_path)) is bool(seconds)
        async with local_cluster(checkpoint, **COLOCATED, **SMALL, **both) as cluster:
            assert await cluster.check_greedy(first, NUM_TOKENS) == (WHOLE if seconds else 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("damage", ["flipped", "cut off", "foreign"])
def test_a_damaged_file_is_a_miss_and_is_removed(checkpoint: TinyCheckpoint, tmp_path: Path, damage: str) -> None:
    async def scenario() -> None:
        async with local_cluster(
            checkpoint, **COLOCATED, **SMALL, kv_file_cache_dir=str(tmp_path), kv_file_cache_bytes=AMPLE
        ) as cluster:
            first = await evict_first(cluster)
            files = saved_in(tmp_path)
            contents = {file: file.read_bytes() for file in files}
            for file, other in zip(files, reversed(files), strict=True):
                data = bytearray(contents[file])
                data[len(data) // 2] ^= 1
                changed = {"flipped": bytes(data), "cut off": contents[file][:-9], "foreign": contents[other]}[damage]
                file.write_bytes(changed)
            assert len(files) > 1
            assert await cluster.check_greedy(first, NUM_TOKENS) == 0
            assert tiers(cluster)["file"].damaged == 1  # nothing after it is of use
            assert sum(file.exists() for file in files) == len(files) - 1

    asyncio.run(scenario())


def test_the_limits_are_kept(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    limit = 10 * checkpoint.spec.block_bytes

    async def scenario() -> None:
        async with local_cluster(
            checkpoint,
            **COLOCATED,
            **SMALL,
            kv_host_cache_bytes=limit,
            kv_file_cache_dir=str(tmp_path),
            kv_file_cache_bytes=limit,
        ) as cluster:
            for seed in range(12):
                await cluster.check_greedy(checkpoint.prompt(PROMPT_TOKENS, seed=seed), NUM_TOKENS)
            await until(lambda: tiers(cluster)["file"].evictions > 0, "files to be evicted")
            for tier in tiers(cluster).values():
                assert 0 < tier.num_bytes <= limit
                assert tier.evictions > 0
            assert sum(file.stat().st_size for file in saved_in(tmp_path)) <= limit

    asyncio.run(scenario())


def test_what_is_quicker_to_compute_is_computed(checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with local_cluster(
            checkpoint, **COLOCATED, **SMALL, kv_file_cache_dir=str(tmp_path), kv_file_cache_bytes=AMPLE
        ) as cluster:
            first = await evict_first(cluster)
            kept = cluster.workers["colocated-0"].tiers
            assert kept is not None
            kept._file_rate.add(1, 1000.0)  # a very slow disk
            assert await cluster.check_greedy(first, NUM_TOKENS) == 0
            assert tiers(cluster)["file"].hits == 0

    asyncio.run(scenario())
