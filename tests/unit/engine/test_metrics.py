"""Every number on /metrics, under both of its names."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.metrics import Metrics
from kvcache.spec import KVCacheSpec
from scheduler.request import FinishReason
from scheduler.types import (
    ClusterSnapshot,
    DeviceProfile,
    PredictionErrors,
    TierLoad,
    WorkerInfo,
    WorkerLoad,
    WorkerRole,
    WorkerSnapshot,
)
from tests.builders import make_shape
from tests.fakes import FakeEngine, ManualClock, Script
from tests.unit.engine.calls import COMPLETIONS, call
from workers.stages import Stage


def worker(worker_id: str, role: WorkerRole, load: WorkerLoad, incarnation: int = 1) -> WorkerSnapshot:
    device = DeviceProfile("cpu", 100.0, 10.0, 1 << 30)
    spec = KVCacheSpec(2, 1, 8, 16, "float32")
    info = WorkerInfo(worker_id, incarnation, role, "127.0.0.1:1", 7, device, "tiny", 100, spec, 10, make_shape(spec))
    return WorkerSnapshot(info, load, 0, 0, 0, 0.0)


class Board:
    """Metrics over a cluster and a clock that the test sets."""

    def __init__(self) -> None:
        self.cluster = ClusterSnapshot()
        self.clock = ManualClock()
        self.metrics = Metrics("tiny", lambda: self.cluster, self.clock)

    def value(self, name: str, **labels: str) -> float:
        """The only sample with this name and these labels."""
        wanted = {"model_name": "tiny"} | labels
        (found,) = [
            sample.value
            for family in text_string_to_metric_families(self.metrics.exposition().decode())
            for sample in family.samples
            if sample.name == name and wanted.items() <= sample.labels.items()
        ]
        return found


@pytest.fixture
def board() -> Board:
    return Board()


def both(name: str) -> tuple[str, str]:
    return f"twinpool_{name}", f"vllm:{name}"


def test_a_sequence_is_timed_from_the_request_to_its_end(board: Board) -> None:
    with board.metrics.recorder(num_prompt_tokens=7, started_s=0.0) as recorder:
        for at, tokens, reason in ((0.5, 1, None), (0.7, 0, None), (0.75, 2, None), (0.85, 1, FinishReason.LENGTH)):
            board.clock.now_s = at
            recorder.on_delta(tokens, reason)
    for first_token, inter_token, latency in zip(
        both("time_to_first_token_seconds"), both("inter_token_latency_seconds"), both("e2e_request_latency_seconds"),
        strict=True,
    ):  # fmt: skip
        assert board.value(f"{first_token}_sum") == 0.5
        assert board.value(f"{inter_token}_count") == 2
        assert board.value(f"{inter_token}_sum") == pytest.approx(0.35)
        assert board.value(f"{latency}_sum") == 0.85
    for prefix in ("twinpool_", "vllm:"):
        assert board.value(f"{prefix}prompt_tokens_total") == 7
        assert board.value(f"{prefix}generation_tokens_total") == 4
        assert board.value(f"{prefix}request_prompt_tokens_sum") == 7
        assert board.value(f"{prefix}request_generation_tokens_sum") == 4
        assert board.value(f"{prefix}request_success_total", finished_reason="length") == 1
        assert board.value(f"{prefix}request_success_total", finished_reason="stop") == 0


@pytest.mark.parametrize(
    ("error", "reason"), [(GeneratorExit(), "abort"), (asyncio.CancelledError(), "abort"), (ValueError(), "error")]
)
def test_a_sequence_left_early_counts_by_what_ended_it(board: Board, error: BaseException, reason: str) -> None:
    with pytest.raises(type(error)), board.metrics.recorder(3, 0.0):
        raise error
    assert board.value("twinpool_request_success_total", finished_reason=reason) == 1
    assert board.value("twinpool_e2e_request_latency_seconds_count") == 0


def test_gauges_are_the_workers_own_counts(board: Board) -> None:
    load = WorkerLoad(running=3, waiting=2, blocks_free=4, blocks_leased=5, blocks_unaccounted=1)
    board.cluster = ClusterSnapshot((worker("decode-0", WorkerRole.DECODE, load),))
    labels = {"worker": "decode-0", "role": "decode"}
    for prefix in ("twinpool_", "vllm:"):
        assert board.value(f"{prefix}num_requests_running", **labels) == 3
        assert board.value(f"{prefix}num_requests_waiting", **labels) == 2
        assert board.value(f"{prefix}kv_cache_usage_perc", **labels) == pytest.approx(0.6)
    assert board.value("twinpool_kv_blocks_leased", **labels) == 5
    assert board.value("twinpool_kv_blocks_unaccounted", **labels) == 1
    assert board.value("twinpool_pool_workers", role="decode", device="cpu") == 1


def test_counters_go_on_when_a_worker_restarts_and_stay_when_it_is_gone(board: Board) -> None:
    load = WorkerLoad(
        preemptions=2,
        prefix_cache_queries=70,
        prefix_cache_hits=30,
        transfer_bytes=100,
        transfer_seconds=1.5,
        transfer_failures=(("expired", 3), ("aborted", 1), ("stale_epoch", 2)),
        blocks_resumed=9,
        tiers=(TierLoad("host", 1000, 5, 4, 3, 2),),
    )
    first = worker("decode-0", WorkerRole.DECODE, load)
    restarted = worker("decode-0", WorkerRole.DECODE, WorkerLoad(transfer_bytes=10, preemptions=1), incarnation=2)
    for workers, transferred in (((first,), 100), ((restarted,), 110), ((first,), 110), ((), 110)):
        board.cluster = ClusterSnapshot(workers)
        assert board.value("twinpool_kv_transfer_bytes_total", worker="decode-0") == transferred
    assert board.value("vllm:num_preemptions_total", worker="decode-0") == 3
    assert board.value("vllm:prefix_cache_queries_total", worker="decode-0") == 70
    assert board.value("vllm:prefix_cache_hits_total", worker="decode-0") == 30
    assert board.value("twinpool_kv_transfer_seconds_total") == 1.5
    assert board.value("twinpool_kv_blocks_resumed_total") == 9
    for name, number in (("hits", 5), ("evictions", 4), ("unsaved", 3), ("damaged", 2)):
        assert board.value(f"twinpool_kv_tier_{name}_total", tier="host") == number
    assert board.value("twinpool_kv_transfers_fenced_total") == 2
    assert board.value("twinpool_kv_transfer_failures_total", reason="expired") == 3


def test_a_scrape_twice_counts_once(board: Board) -> None:
    snapshot = worker("decode-0", WorkerRole.DECODE, WorkerLoad(preemptions=2))
    board.cluster = ClusterSnapshot((snapshot, replace(snapshot, info=replace(snapshot.info, worker_id="decode-1"))))
    board.metrics.exposition()
    assert board.value("twinpool_num_preemptions_total", worker="decode-0") == 2


def test_no_family_is_exposed_twice(board: Board) -> None:
    text = board.metrics.exposition().decode()
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types)) > 20
    assert "_created" not in text
    assert "vllm:kv_transfer" not in text


def test_requests_are_recorded_by_the_api() -> None:
    engine = FakeEngine()
    board = Board()
    assert call(engine, COMPLETIONS, {"prompt": [1, 2, 3], "n": 2}, metrics=board.metrics).status_code == 200
    engine = FakeEngine(Script(error=ZeroDivisionError()))
    assert call(engine, COMPLETIONS, {"prompt": [1, 2, 3]}, metrics=board.metrics).status_code == 500
    assert board.value("vllm:request_success_total", finished_reason="stop") == 2
    assert board.value("vllm:request_success_total", finished_reason="error") == 1
    assert board.value("vllm:generation_tokens_total") == 4


def test_how_far_off_predictions_were_is_told_by_what_was_predicted(board: Board) -> None:
    decode = replace(
        worker("decode-0", WorkerRole.DECODE, WorkerLoad()), errors=PredictionErrors(decode=0.25, tpot=0.5)
    )
    board.cluster = ClusterSnapshot((decode,))
    assert board.value("twinpool_cost_model_error", worker="decode-0", of="decode") == 0.25
    assert board.value("twinpool_cost_model_error", worker="decode-0", of="tpot") == 0.5
    assert 'of="ttft"' not in board.metrics.exposition().decode()


def test_restarts_are_counted_by_how_often_a_worker_was_started(board: Board) -> None:
    for incarnation in (1, 2, 5):
        board.cluster = ClusterSnapshot((worker("decode-0", WorkerRole.DECODE, WorkerLoad(), incarnation),))
        assert board.value("twinpool_worker_restarts_total", worker="decode-0") == incarnation - 1
    board.cluster = ClusterSnapshot()
    assert board.value("twinpool_worker_restarts_total", worker="decode-0") == 4


def test_stages_are_told_one_by_one_and_as_vllm_cuts_them(board: Board) -> None:
    handed_over = {
        Stage.QUEUE_DECODE: 0.5,
        Stage.QUEUE_PREFILL: 1.0,
        Stage.PREFILL: 2.0,
        Stage.TRANSFER: 0.25,
        Stage.FIRST_DECODE: 0.125,
        Stage.DECODE: 4.0,
    }
    board.metrics.observe_stages(handed_over)
    board.metrics.observe_stages({Stage.QUEUE_PREFILL: 1.0, Stage.PREFILL: 3.0})  # one token, in place
    for stage, seconds in (handed_over | {Stage.QUEUE_PREFILL: 2.0, Stage.PREFILL: 5.0}).items():
        assert board.value("twinpool_request_stage_seconds_sum", stage=stage.value) == seconds
    for prefill, decode in zip(both("request_prefill_time_seconds"), both("request_decode_time_seconds"), strict=True):
        assert board.value(f"{prefill}_sum") == 2.25 + 3.0
        assert board.value(f"{decode}_sum") == 4.125
        assert board.value(f"{decode}_count") == 1
