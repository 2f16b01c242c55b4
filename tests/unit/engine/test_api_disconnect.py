"""A client that leaves takes its sequences with it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes import FakeEngine, Script, deltas_of
from tests.unit.engine.calls import CHAT, COMPLETIONS, HELLO, RawClient, app_of

TALKS_THEN_HANGS = Script(deltas_of("a", "b", "never")[:2], hangs=True)
HANGS = Script(hangs=True)


async def leave_midway(
    engine: FakeEngine, path: str, body: dict[str, Any], wait_for_chunk: bool
) -> list[dict[str, Any]]:
    """Sends the request, waits until the engine is at work, closes the connection; returns what was sent."""
    gone, got_chunk = asyncio.Event(), asyncio.Event()
    sent: list[dict[str, Any]] = []
    client = RawClient(app_of(engine), path, body)
    request = asyncio.create_task(client.run(gone, sent, got_chunk))
    await engine.started.wait()
    if wait_for_chunk:
        await got_chunk.wait()
    assert engine.open == len(engine.calls)
    gone.set()
    await asyncio.wait_for(request, timeout=1)
    return sent


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("script", [TALKS_THEN_HANGS, HANGS], ids=["talking", "silent"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_disconnect_aborts_every_sequence(path: str, n: int, script: Script, stream: bool) -> None:
    engine = FakeEngine(script)
    body = {"prompt": "hello"} if path == COMPLETIONS else {"messages": HELLO}
    wait_for_chunk = stream and script is TALKS_THEN_HANGS
    sent = asyncio.run(leave_midway(engine, path, body | {"n": n, "stream": stream}, wait_for_chunk))
    assert engine.calls
    assert (engine.aborted, engine.open) == (len(engine.calls), 0)
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


def test_a_cancelled_server_aborts_every_sequence() -> None:
    engine = FakeEngine(HANGS)

    async def run() -> None:
        client = RawClient(app_of(engine), COMPLETIONS, {"prompt": "hello", "n": 2})
        request = asyncio.create_task(client.run(asyncio.Event(), [], asyncio.Event()))
        await engine.started.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(run())
    assert (engine.aborted, engine.open) == (len(engine.calls), 0)


def test_a_connection_that_breaks_while_writing_aborts_the_sequence() -> None:
    engine = FakeEngine(TALKS_THEN_HANGS)

    class Broken(RawClient):
        async def run(self, gone: asyncio.Event, sent: list[dict[str, Any]], got_chunk: asyncio.Event) -> None:
            app = self.app

            async def breaking(scope: Any, receive: Any, send: Any) -> None:
                async def broken_send(message: Any) -> None:
                    if message["type"] == "http.response.body":
                        raise OSError("broken pipe")
                    await send(message)

                await app(scope, receive, broken_send)

            await RawClient(breaking, self.path, self.body).run(gone, sent, got_chunk)  # type: ignore[arg-type]

    client = Broken(app_of(engine), COMPLETIONS, {"prompt": "hello", "stream": True})
    asyncio.run(client.run(asyncio.Event(), [], asyncio.Event()))
    assert (engine.aborted, engine.open) == (1, 0)
