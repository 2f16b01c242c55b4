"""What operators read: the status table, the line of activity, and who came and went."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from engine.activity_log import activity_line, membership_news
from engine.cluster_view import status_table
from kvcache.spec import KVCacheSpec
from scheduler.types import (
    ClusterSnapshot,
    DeviceProfile,
    PredictionErrors,
    WorkerInfo,
    WorkerLoad,
    WorkerRole,
    WorkerSnapshot,
)
from tests.builders import make_shape

INFO = WorkerInfo(
    worker_id="decode-0",
    incarnation=1,
    role=WorkerRole.DECODE,
    address="127.0.0.1:41234",
    process_id=7,
    device=DeviceProfile("cpu", gemm_gflop_s=81.4, read_gb_s=12.3, memory_bytes=1, num_threads=2),
    model="tiny",
    max_model_len=512,
    spec=KVCacheSpec(2, 1, 16, 16, "float32"),
    num_blocks=100,
    shape=make_shape(),
)


def view(load: WorkerLoad, incarnation: int = 1) -> ClusterSnapshot:
    worker = WorkerSnapshot(replace(INFO, incarnation=incarnation), load, 0, 0, 0, 0.0)
    return ClusterSnapshot((worker,), ("prefill-0",))


def test_the_table_shows_how_many_ranks_a_worker_has() -> None:
    worker = WorkerSnapshot(replace(INFO, tensor_parallel_size=3), WorkerLoad(), 0, 0, 0, 0.0)
    output = io.StringIO()
    Console(file=output, width=120).print(status_table(ClusterSnapshot((worker,))))
    assert "decode x3" in output.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_names_every_worker_whole(width: int) -> None:
    output = io.StringIO()
    cluster = view(WorkerLoad(running=3, waiting=5, blocks_free=60))
    Console(file=output, width=width).print(status_table(cluster))
    shown = output.getvalue()
    for word in ("decode-0", "decode", "81", "12.3", "40", "60", "3", "5", "prefill-0", "away", "tiny", "float32"):
        assert word in shown


def test_activity_is_rates_over_the_interval_and_silence_without_any() -> None:
    idle = view(WorkerLoad(blocks_free=100))
    busy = view(WorkerLoad(running=2, blocks_free=75, prompt_tokens_computed=500, generation_tokens=50))
    assert activity_line(idle, idle, 5.0) is None
    line = activity_line(idle, busy, 5.0) or ""
    assert "running 2" in line
    assert "prompt 100 tok/s" in line
    assert "generation 10 tok/s" in line
    assert "decode-0 25.0%" in line


def test_the_prefix_hit_rate_is_that_of_the_workers_that_prefill() -> None:
    def both(prefill: WorkerLoad, decode: WorkerLoad) -> ClusterSnapshot:
        roles = ((WorkerRole.PREFILL, prefill), (WorkerRole.DECODE, decode))
        return ClusterSnapshot(
            tuple(
                WorkerSnapshot(replace(INFO, worker_id=role.value, role=role), load, 0, 0, 0, 0.0)
                for role, load in roles
            )
        )

    before = both(WorkerLoad(prefix_cache_queries=100, prefix_cache_hits=50), WorkerLoad())
    after = both(
        WorkerLoad(running=1, prefix_cache_queries=300, prefix_cache_hits=100),
        WorkerLoad(prefix_cache_queries=900, prefix_cache_hits=900),
    )
    assert "prefix hit rate 25.0%" in (activity_line(before, after, 5.0) or "")
    assert "prefix hit rate" not in (activity_line(after, after, 5.0) or "")


def test_a_restarted_worker_counts_from_zero() -> None:
    before = view(WorkerLoad(blocks_free=100, generation_tokens=900))
    after = view(WorkerLoad(blocks_free=100, generation_tokens=10), incarnation=2)
    assert "generation 2 tok/s" in (activity_line(before, after, 5.0) or "")


def test_who_went_and_who_came_is_told() -> None:
    there, gone, back = view(WorkerLoad()), ClusterSnapshot(), view(WorkerLoad(), incarnation=2)
    assert membership_news(there, there) == []
    assert membership_news(there, gone) == ["decode-0 was lost"]
    assert membership_news(gone, back) == ["decode-0 has joined"]
    assert membership_news(there, back) == ["decode-0 was lost", "decode-0 has joined"]


def test_the_table_says_how_far_off_latencies_were_predicted() -> None:
    worker = replace(view(WorkerLoad()).workers[0], errors=PredictionErrors(prefill=0.3, ttft=0.12, tpot=0.04))
    assert status_table(ClusterSnapshot((worker,))).caption == (
        "predictions off by (median): decode-0 TTFT 12%, TPOT 4%"
    )
    assert status_table(view(WorkerLoad())).caption is None
