"""The load generator against small servers on loopback: what is sent, what is counted, how it ends."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks.serve import main

pytestmark = pytest.mark.integration

TOKEN_INTERVAL_S = 0.01
FLAGS = ["--num-prompts", "6", "--request-rate", "60", "--input-tokens", "5", "--output-tokens", "4"]


class FakeServer:
    """An OpenAI-compatible server in a thread; ``misbehave`` decides per request how its stream goes wrong."""

    def __init__(self, misbehave: Callable[[int], str | None]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.under_way = 0
        self.max_under_way = 0
        self._misbehave = misbehave
        self._closing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._runner = web.AppRunner(self._app(), shutdown_timeout=1.0)
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.base_url = self._call(self._start())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        return app

    async def _start(self) -> str:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        number = len(self.bodies)
        self.bodies.append(await request.json())
        self.authorizations.append(request.headers.get("Authorization"))
        fault = self._misbehave(number)
        if fault == "http_503":
            return web.json_response({"error": {"message": "full"}}, status=503)
        self.under_way += 1
        self.max_under_way = max(self.max_under_way, self.under_way)
        try:
            return await self._stream(request, self.bodies[number], fault)
        finally:
            self.under_way -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], fault: str | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        num_tokens = body["max_tokens"]
        for position in range(num_tokens):
            await asyncio.sleep(TOKEN_INTERVAL_S)
            last = position == num_tokens - 1
            if fault == "error_frame" and position == 1:
                await send({"error": {"message": "worker lost", "type": "server_error"}})
                return response
            if fault == "connection" and position == 1 and request.transport is not None:
                request.transport.abort()
                return response
            if fault == "timeout" and position == 1:
                await self._closing.wait()
                return response
            await send({"choices": [_choice(body, "length" if last and fault is None else None)]})
        await send({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": num_tokens}})
        await response.write(b"data: [DONE]\n\n")
        return response


def _choice(body: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    content: dict[str, Any] = {"delta": {"content": "a"}} if "messages" in body else {"text": "a"}
    return {"index": 0, "finish_reason": finish_reason, **content}


StartServer = Callable[[Callable[[int], str | None]], FakeServer]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    servers: list[FakeServer] = []

    def start(misbehave: Callable[[int], str | None]) -> FakeServer:
        servers.append(FakeServer(misbehave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
        assert server.under_way == 0


def well_behaved(number: int) -> str | None:
    return None


def from_second_request(fault: str) -> Callable[[int], str | None]:
    """Leaves the warm-up, which is request 0, alone."""
    return lambda number: fault if number > 0 else None


def run(server: FakeServer, path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    status = main(["--base-url", server.base_url, "--json", str(path), *FLAGS, *flags])
    return status, json.loads(path.read_bytes())


def test_a_good_server_gives_full_counts_and_times_that_fit_its_pace(
    start_server: StartServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_server(well_behaved)
    status, result = run(server, tmp_path / "r.json", "--goodput", "ttft:5000", "tpot:5000")
    assert status == 0
    assert (result["completed"], result["failed"], result["errors"]) == (6, 0, {})
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 24)
    assert result["model_id"] == "tiny"
    assert result["goodput"] == pytest.approx(result["request_throughput"])
    # The server waits this long before each token, never less; the upper bounds allow for a busy machine.
    for name in ("ttft", "tpot", "itl"):
        assert 0.8 * TOKEN_INTERVAL_S <= result[f"mean_{name}_ms"] / 1e3 < 1.0
    assert result["median_e2el_ms"] >= 3.5 * TOKEN_INTERVAL_S * 1e3
    captured = capsys.readouterr()
    assert "6 / 0" in captured.out
    assert captured.err.count("%") == 6


def test_the_server_receives_what_was_asked_for_after_one_warm_up(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(well_behaved)
    run(server, tmp_path / "r.json", "--api-key", "word", "--token-ids", "100:200")
    assert len(server.bodies) == 1 + 6
    assert set(server.authorizations) == {"Bearer word"}
    for body in server.bodies:
        assert (body["model"], body["max_tokens"], body["temperature"], body["ignore_eos"]) == ("tiny", 4, 0.0, True)
        assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
        assert len(body["prompt"]) == 5 and all(100 <= token < 200 for token in body["prompt"])
    assert "word" not in (tmp_path / "r.json").read_text(encoding="utf-8")


def test_chat_sends_words_and_leaves_ignore_eos_out_when_told(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(well_behaved)
    status, result = run(server, tmp_path / "r.json", "--endpoint", "chat", "--no-ignore-eos", "--model", "named")
    assert (status, result["completed"], result["model_id"]) == (0, 6, "named")
    for body in server.bodies:
        assert len(body["messages"][0]["content"].split()) == 5
        assert "ignore_eos" not in body and "prompt" not in body


@pytest.mark.parametrize("fault", ["no_finish_reason", "error_frame", "http_503", "connection", "timeout"])
def test_requests_that_go_wrong_count_as_failed_under_their_reason(
    start_server: StartServer, tmp_path: Path, fault: str
) -> None:
    server = start_server(lambda number: fault if number in (2, 4) else None)
    status, result = run(server, tmp_path / "r.json", "--timeout", "1")
    assert status == 0
    assert (result["completed"], result["failed"], result["errors"]) == (4, 2, {fault: 2})
    assert result["total_output_tokens"] == 16


def test_nothing_completed_is_exit_status_1_with_a_result(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(from_second_request("no_finish_reason"))
    status, result = run(server, tmp_path / "r.json")
    assert status == 1
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 6, None)


def test_the_loop_is_open_and_closes_only_on_demand(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(well_behaved)
    run(server, tmp_path / "r.json", "--request-rate", "inf", "--output-tokens", "10")
    assert server.max_under_way == 6
    server.max_under_way = 0
    _, result = run(server, tmp_path / "r.json", "--request-rate", "inf", "--max-concurrency", "2")
    assert server.max_under_way == 2
    assert result["p99_send_delay_ms"] >= 2 * 4 * TOKEN_INTERVAL_S * 1e3 * 0.8


def test_a_trace_is_replayed_with_its_lengths(start_server: StartServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 200 * n, "input_length": 600 + n, "output_length": 2, "hash_ids": [7, n]} for n in range(3)]
    trace.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    server = start_server(well_behaved)
    json_path = tmp_path / "r.json"
    flags = ["--trace", str(trace), "--trace-scale", "4", "--max-input-tokens", "601", "--json", str(json_path)]
    assert main(["--base-url", server.base_url, *flags]) == 0
    prompts = [body["prompt"] for body in server.bodies[1:]]
    assert [len(prompt) for prompt in prompts] == [600, 601, 601]
    assert prompts[0][:512] == prompts[1][:512] == prompts[2][:512]
    result = json.loads(json_path.read_bytes())
    assert (result["trace"], result["shortened_prompts"]) == ("trace.jsonl", 1)
    assert result["request_rate"] == pytest.approx(3 / 0.1)
    assert str(tmp_path) not in json.dumps(result)


@pytest.mark.parametrize("model", ["auto", "named"])
def test_an_unreachable_server_is_one_sentence_and_status_1(
    model: str, start_server: StartServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_server(well_behaved)
    # Port 1 is reserved and unused on loopback.
    assert main(["--base-url", "http://127.0.0.1:1", "--model", model]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert server.bodies == []


def test_a_server_that_refuses_the_warm_up_is_one_sentence_and_status_1(
    start_server: StartServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_server(lambda number: "http_503")
    assert main(["--base-url", server.base_url, *FLAGS]) == 1
    assert capsys.readouterr().err == ('error: the warm-up request failed (http_503): {"error": {"message": "full"}}\n')


@pytest.mark.parametrize("flags", [["--seed", "x"], ["--trace", "missing.csv"]])
def test_a_wrong_flag_or_trace_is_one_sentence_and_status_2(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
