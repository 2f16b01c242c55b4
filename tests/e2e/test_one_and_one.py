"""The main job: one prefill and one decode worker, the real model, real Ray, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from scheduler.types import WorkerRole
from tests.e2e.client import complete, complete_all, expected
from tests.e2e.reference import ReferenceCase
from tests.e2e.server import RunningServer, serving, wait_until

pytestmark = pytest.mark.e2e
MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    # By cost, a prompt of one token is prefilled in place; here every one is to be handed over.
    with serving("--placement-policy", "least_loaded", expected_workers=2) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_leak(server: RunningServer) -> Iterator[None]:
    yield
    server.wait_until_idle()


def test_the_phases_are_split_and_the_bytes_are_those_of_the_spec(
    server: RunningServer, reference: list[ReferenceCase]
) -> None:
    before = server.wait_until_idle()
    outputs = asyncio.run(complete_all(server.url, reference, at_once=1, apart=True))
    after = server.wait_until_idle()
    assert outputs == expected(reference)

    loads_before = {worker.info.role: worker.load for worker in before.workers}
    loads_after = {worker.info.role: worker.load for worker in after.workers}
    decode, prefill = loads_after[WorkerRole.DECODE], loads_after[WorkerRole.PREFILL]
    assert decode.prompt_tokens_computed == 0
    assert prefill.prompt_tokens_computed - loads_before[WorkerRole.PREFILL].prompt_tokens_computed == sum(
        len(case.prompt_token_ids) for case in reference
    )
    spec = after.workers[0].info.spec
    assert decode.transfer_bytes - loads_before[WorkerRole.DECODE].transfer_bytes == sum(
        spec.handoff_bytes(len(case.prompt_token_ids)) for case in reference
    )
    assert decode.transfer_failures == ()


def test_sixteen_at_once_give_the_same_tokens(server: RunningServer, reference: list[ReferenceCase]) -> None:
    assert asyncio.run(complete_all(server.url, reference, at_once=16)) == expected(reference)


def test_a_prompt_that_came_before_is_neither_computed_nor_sent_again(
    server: RunningServer, reference: list[ReferenceCase]
) -> None:
    case = next(case for case in reference if len(case.prompt_token_ids) == 200)
    body = {"prompt": list(case.prompt_token_ids), "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    told, computed, sent = [], [], []
    for _ in range(2):
        before = {worker.info.role: worker.load for worker in server.wait_until_idle().workers}
        answer = httpx.post(f"{server.url}/v1/completions", json=body | {"cache_salt": "twice"}, timeout=60).json()
        after = {worker.info.role: worker.load for worker in server.wait_until_idle().workers}
        assert tuple(answer["choices"][0]["token_ids"]) == case.output_token_ids
        told.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        prefill, decode = WorkerRole.PREFILL, WorkerRole.DECODE
        computed.append(after[prefill].prompt_tokens_computed - before[prefill].prompt_tokens_computed)
        sent.append(after[decode].transfer_bytes - before[decode].transfer_bytes)
    spec = server.cluster().workers[0].info.spec
    assert (told, computed) == ([0, 192], [200, 8])
    assert sent == [spec.handoff_bytes(200), spec.handoff_bytes(8)]
    other = httpx.post(f"{server.url}/v1/completions", json=body | {"cache_salt": "other"}, timeout=60).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_openai_client_streams_a_chat(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens >= 2


def test_a_seed_fixes_the_tokens_and_n_gives_different_choices(server: RunningServer) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 12, "seed": 7, "n": 3, "top_p": 0.9, "top_k": 50}
    answers = [httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json() for _ in range(2)]
    texts = [[choice["text"] for choice in answer["choices"]] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_a_stop_string_ends_the_text_before_it(server: RunningServer) -> None:
    body = {"prompt": "1, 2, 3, 4,", "max_tokens": 40, "temperature": 0, "stop": [" 8"]}
    choice = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " 8")
    assert choice["text"] == " 5, 6, 7,"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: RunningServer, stream: bool) -> None:
    def used() -> int:
        return sum(worker.info.num_blocks - worker.load.blocks_free for worker in server.cluster().workers)

    async def leave() -> None:
        body = {"prompt": [500] * 300, "max_tokens": 4000, "ignore_eos": True, "stream": stream}
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            request = asyncio.create_task(client.post("/v1/completions", json=body))
            while used() == 0:
                assert not request.done()
                await asyncio.sleep(0.1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    asyncio.run(leave())
    wait_until("the blocks are free", lambda: used() == 0, timeout_s=5)


BAD_BODIES = {
    "max_tokens over the context": ({"prompt": "hi", "max_tokens": 9000}, 400, "max_tokens"),
    "prompt over the context": ({"prompt": [5] * 8192}, 400, "prompt"),
    "empty prompt": ({"prompt": ""}, 400, "prompt"),
    "unknown model": ({"prompt": "hi", "model": "gpt-17"}, 404, "model"),
    "wrong type": ({"prompt": {"a": 1}}, 400, "prompt"),
    "negative": ({"prompt": "hi", "max_tokens": -1}, 400, "max_tokens"),
    "huge": ({"prompt": "hi", "top_k": 2**70}, 400, "top_k"),
    "text for a number": ({"prompt": "hi", "temperature": "hot"}, 400, "temperature"),
    "token out of vocabulary": ({"prompt": [49152]}, 400, "prompt"),
    "too many": ({"prompt": "hi", "logprobs": 21}, 400, "logprobs"),
    "not honoured": ({"prompt": "hi", "response_format": {"type": "json_object"}}, 400, "response_format"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_input_is_named_and_the_server_lives_on(server: RunningServer, name: str) -> None:
    body, status, param = BAD_BODIES[name]
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert response.json()["error"]["message"]
    good = {"prompt": [5], "max_tokens": 1, "temperature": 0}
    assert httpx.post(f"{server.url}/v1/completions", json=good, timeout=30).status_code == 200


def test_an_unknown_role_and_malformed_json_are_refused(server: RunningServer) -> None:
    body = {"messages": [{"role": "wizard", "content": "hi"}]}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages[0].role")
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/v1/chat/completions", content=b'{"messages": [', headers=headers, timeout=30)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_status_shows_both_workers_with_measured_rates(server: RunningServer) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "engine.cli", "status", "--url", server.url],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "200"},
    ).stdout
    for word in ("prefill-0", "decode-0", "GFLOP/s", "GB/s", "KV used", "KV free", "running", "waiting"):
        assert word in shown
    assert all(worker.info.device.gemm_gflop_s > 1 for worker in server.cluster().workers)
    assert all(worker.info.device.read_gb_s > 0.1 for worker in server.cluster().workers)


def test_a_connection_that_was_idle_for_a_while_still_serves(server: RunningServer) -> None:
    """Clients keep theirs for five seconds, as uvicorn would by default: some requests would meet a closing one."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", httpx.URL(server.url).port, timeout=30)) as idle:
        for _ in range(2):
            idle.request("GET", "/health")
            assert idle.getresponse().read() is not None
            opened = idle.sock
            time.sleep(6)
        assert idle.sock is opened is not None


def test_metrics_have_the_names_that_dashboards_know(server: RunningServer) -> None:
    shown = httpx.get(f"{server.url}/metrics", timeout=10).text
    for name in (
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "twinpool_kv_transfer_bytes_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
    ):
        assert name in shown
    leaked = [line for line in shown.splitlines() if line.startswith("twinpool_kv_blocks_unaccounted{")]
    assert len(leaked) == 2
    assert all(line.endswith(" 0.0") for line in leaked)


def test_a_killed_worker_is_started_again_and_serves(server: RunningServer, reference: list[ReferenceCase]) -> None:
    killed = server.workers(WorkerRole.DECODE)[0].info
    os.kill(killed.process_id, 9)

    def is_back() -> bool:
        workers = server.workers(WorkerRole.DECODE)
        return bool(workers) and workers[0].info.incarnation != killed.incarnation

    wait_until("a new decode worker is registered", is_back, timeout_s=90)
    case = reference[0]

    async def ask() -> tuple[int, ...]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            return await complete(client, case.prompt_token_ids)

    assert asyncio.run(ask()) == case.output_token_ids
