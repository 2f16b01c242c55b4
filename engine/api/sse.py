"""Answers that end when the client does: server-sent events, and plain replies with a watch on the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from engine.api.errors import describe
from engine.api.replies import to_json

DONE_FRAME = b"data: [DONE]\n\n"

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client has closed the connection: there is nobody to answer."""


def frame(reply: Any) -> bytes:
    """One event. JSON holds no raw line ends, so one ``data:`` line is enough."""
    return b"data: " + to_json(reply) + b"\n\n"


async def while_connected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Runs ``work``; cancels it as soon as the client is gone.

    The body must have been read before. When this returns or raises, ``work`` has ended, its clean-up included.

    Raises:
        ClientGoneError: the client closed the connection first.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            watch.result()  # a failing connection raises here
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStreamReply(Response):
    """Sends frames as they are made.

    The status is sent with the first frame: an error before it becomes an ordinary HTTP error. An error after it
    becomes an error frame, after which the body ends without ``[DONE]``. The frames' generator is closed before
    this returns, whatever happened, so that the engine gives the request's blocks back at once.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._send_all(send), receive)
        except ClientGoneError:
            return

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._frames) as frames:
            first = await anext(frames)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send_body(send, first)
            try:
                async for data in frames:
                    await _send_body(send, data)
                await _send_body(send, DONE_FRAME)
            except ClientGoneError:
                raise
            except Exception as error:  # noqa: BLE001 - the boundary of a request: told to the client, logged if a bug
                await _send_body(send, frame(describe(error).reply))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_body(send: Send, body: bytes) -> None:
    try:
        await send({"type": "http.response.body", "body": body, "more_body": True})
    except OSError as error:  # how ASGI servers since spec 2.4 say that the connection is closed
        raise ClientGoneError from error
