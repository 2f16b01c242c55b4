"""Talks to the application in process: no server, no socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import orjson
from fastapi import FastAPI

from engine.api.app import create_app
from engine.metrics import Metrics
from tests.fakes import FakeEngine

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def app_of(engine: FakeEngine, api_keys: Sequence[str] = (), metrics: Metrics | None = None) -> FastAPI:
    return create_app(engine, api_keys=api_keys, metrics=metrics or Metrics("tiny", lambda: engine.cluster))


def call(
    target: FakeEngine | FastAPI,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: dict[str, str | bytes] | None = None,
    content: Any = None,
    metrics: Metrics | None = None,
) -> httpx.Response:
    """One request with a body of JSON, or GET without one; to an application of its own if given an engine."""
    app = target if isinstance(target, FastAPI) else app_of(target, metrics=metrics)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            wanted = method or ("GET" if body is None and content is None else "POST")
            sent: dict[Any, Any] = {"content-type": "application/json"} | (headers or {})
            data = content if content is not None else (None if body is None else json.dumps(body).encode())
            return await client.request(wanted, path, content=data, headers=sent)

    return asyncio.run(run())


def frames_of(response: httpx.Response) -> list[Any]:
    """The events of a stream; ``[DONE]`` stays a string. Fails on anything but ``data:`` frames."""
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    frames = response.text.removesuffix("\n\n").split("\n\n")
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [data if data == "[DONE]" else orjson.loads(data) for data in (frame[6:] for frame in frames)]


def assert_openai_error(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The reply is an error of OpenAI's shape that names ``param``."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]
    return error


@dataclass(slots=True)
class RawClient:
    """One ASGI call whose connection the test closes when it likes."""

    app: FastAPI
    path: str
    body: Any
    key: str = ""

    async def run(self, gone: asyncio.Event, sent: list[dict[str, Any]], got_chunk: asyncio.Event) -> None:
        """Ends when the application is done with the request."""
        pending = [{"type": "http.request", "body": orjson.dumps(self.body), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if pending:
                return pending.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(dict(message))
            if message["type"] == "http.response.body":
                got_chunk.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "headers": [(b"content-type", b"application/json"), (b"authorization", f"Bearer {self.key}".encode())],
        }
        await self.app(scope, receive, send)
