"""What stands around every route. Plain ASGI, so that streams and disconnects pass through untouched."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.api.errors import describe, failure
from engine.cache_salt import ANYBODY
from scheduler.tenants import DEFAULT_TENANT

ADMIN_PREFIX = "/admin"
OPEN_PATHS = frozenset({"/health", "/live", "/ready"})
"""Answered without a key: probes have none."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request."""

    identity: str = ANYBODY  # who shares cached KV: see ``engine.cache_salt``
    tenant: str = DEFAULT_TENANT  # who is charged


class ErrorBoundary:
    """One request's bug stays its own: the client gets a 500, the log a traceback, the server lives on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            reply = describe(error)
            if started:
                raise  # half an answer is out: let the server cut the connection
            await reply.response()(scope, receive, send)


def is_admin(path: str) -> bool:
    return path == ADMIN_PREFIX or path.startswith(f"{ADMIN_PREFIX}/")


class AdminKey:
    """Lets admin calls in if they carry the admin key as a bearer token. No API key does."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_admin(scope["path"]):
            given = bearer_token(Headers(scope=scope))
            if given is None or not hmac.compare_digest(given, self._key):
                await _refuse(scope, receive, send, "no valid admin key; send it as 'Authorization: Bearer KEY'")
                return
        await self._app(scope, receive, send)


class ApiKeys:
    """Lets a request in if it carries one of the keys as a bearer token, and notes whose it is: ``caller_of``.

    Admin calls pass: they have a key of their own.
    """

    def __init__(self, app: ASGIApp, callers: Mapping[str, Caller]) -> None:
        """``callers``: by key."""
        self._app = app
        self._callers = {key.encode(): caller for key, caller in callers.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or is_admin(scope["path"]):
            await self._app(scope, receive, send)
            return
        caller = self._identify(Headers(scope=scope))
        if caller is not None:
            scope.setdefault("state", {})["caller"] = caller
            await self._app(scope, receive, send)
            return
        await _refuse(scope, receive, send, "no valid API key; send it as 'Authorization: Bearer KEY'")

    def _identify(self, headers: Headers) -> Caller | None:
        given = bearer_token(headers)
        if given is None:
            return None
        caller = None
        for key, owner in self._callers.items():  # all of them, so that the time does not tell which was close
            if hmac.compare_digest(given, key):
                caller = owner
        return caller


def bearer_token(headers: Headers) -> bytes | None:
    """The bytes of the header's token; None where there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else None


async def _refuse(scope: Scope, receive: Receive, send: Send, message: str) -> None:
    refusal = failure(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    await refusal.response()(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """Who sent a request, by the key it carried; anybody, of the default tenant, where none is asked for."""
    caller: Caller = getattr(request.state, "caller", _ANY_CALLER)
    return caller


_ANY_CALLER = Caller()


class BodyLimit:
    """Refuses a body that is too large, by what it announces or else by what has arrived."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._max_bytes):
            await describe(self._too_large()).response()(scope, receive, send)
            return
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()  # the router's handlers make the reply
            return message

        await self._app(scope, counted_receive, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is larger than {self._max_bytes} bytes")
