"""Other shapes of the cluster: two workers in each pool, and both phases on one worker."""

from __future__ import annotations

import asyncio
import signal

import httpx
import pytest

from scheduler.types import WorkerRole
from tests.e2e.client import complete_all, expected
from tests.e2e.reference import ReferenceCase
from tests.e2e.server import serving

pytestmark = pytest.mark.e2e


def test_two_and_two_share_thirty_two_requests(reference: list[ReferenceCase]) -> None:
    short = [case for case in reference if len(case.prompt_token_ids) <= 200]
    cases = [
        ReferenceCase(f"{case.name} again" if index >= len(short) else case.name, *_ids(case))
        for index, case in enumerate((short * 2)[:32])
    ]
    assert len({case.name for case in cases}) == 32
    with serving("--prefill-workers", "2", "--decode-workers", "2", expected_workers=4) as server:
        assert asyncio.run(complete_all(server.url, cases, at_once=32)) == expected(cases)
        cluster = server.wait_until_idle()
    for worker in cluster.workers:
        load = worker.load
        if worker.info.role is WorkerRole.PREFILL:
            assert load.prompt_tokens_computed > 0, f"{worker.info.worker_id} got no work"
        else:
            assert load.prompt_tokens_computed == 0
            assert load.transfers > 0, f"{worker.info.worker_id} got no work"


def test_a_colocated_worker_gives_the_same_tokens_without_a_handoff(reference: list[ReferenceCase]) -> None:
    with serving("--colocated", "1", expected_workers=1) as server:
        assert asyncio.run(complete_all(server.url, reference, at_once=1)) == expected(reference)
        assert asyncio.run(complete_all(server.url, reference, at_once=16)) == expected(reference)
        load = server.wait_until_idle().workers[0].load
    assert load.transfers == 0
    assert load.prefix_cache_hits > 0
    num_prompt_tokens = 2 * sum(len(case.prompt_token_ids) for case in reference)
    assert load.prompt_tokens_computed + load.prefix_cache_hits == load.prefix_cache_queries == num_prompt_tokens


def test_a_stream_that_outlives_the_shutdown_ends_with_an_error_frame() -> None:
    with serving("--colocated", "1", "--shutdown-timeout", "1", expected_workers=1) as server:
        body = {"prompt": [500] * 20, "max_tokens": 8000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            frames = (line for line in response.iter_lines() if line.startswith("data: "))
            assert "choices" in next(frames)
            server.process.send_signal(signal.SIGTERM)
            *_, last = frames
        assert "shutting down" in last
        assert "error" in last
        server.has_ended = True
        server.process.wait(30)
        assert "Traceback" not in server.output.read_text()


@pytest.mark.slow
def test_int8_weights_answer(reference: list[ReferenceCase]) -> None:
    """Given the same text, int8 chooses 19 of 20 tokens as float32 does (README)."""
    short = [case for case in reference if 15 <= len(case.prompt_token_ids) <= 200]
    pools = ("--quantization", "int8", "--placement-policy", "least_loaded")
    with serving(*pools, expected_workers=2) as server:
        answers = asyncio.run(complete_all(server.url, short, at_once=8))
        assert sum(answers[case.name][0] == case.output_token_ids[0] for case in short) >= 0.8 * len(short)
        assert answers != expected(short), "float32 answered"
        workers = server.wait_until_idle().workers
        assert sum(worker.load.transfers for worker in workers) == len(short)
        for shape in (worker.info.shape for worker in workers):  # 2 FLOP per weight; a byte, and 2 for the scale of 64
            assert shape.weight_bytes == pytest.approx(shape.linear_flops / 2 * (1 + 2 / 64))


def _ids(case: ReferenceCase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return case.prompt_token_ids, case.output_token_ids
