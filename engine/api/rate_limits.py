"""``x-ratelimit-*``: what a tenant with limits has left, on every answer to a request that counts, refusals included.

The names and formats are OpenAI's, which its clients and libraries for pacing read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.api.middleware import caller_of
from scheduler.tenants import Allowance

COUNTED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


class AllowanceBook(Protocol):
    """What ``engine.tenant_desk.TenantDesk`` offers."""

    def allowances(self, tenant: str) -> Sequence[Allowance]: ...


class RateLimitHeaders:
    """As of the moment when an answer begins: a request holds what it may come to until it ends."""

    def __init__(self, app: ASGIApp, book: AllowanceBook) -> None:
        self._app = app
        self._book = book

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in COUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        tenant = caller_of(Request(scope)).tenant

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for allowance in self._book.allowances(tenant):
                    headers[f"x-ratelimit-limit-{allowance.of}"] = str(allowance.per_minute)
                    headers[f"x-ratelimit-remaining-{allowance.of}"] = str(allowance.remaining)
                    headers[f"x-ratelimit-reset-{allowance.of}"] = duration(allowance.full_in_s)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``1m0s``, ``7s``, ``350ms``; rounded up, so that nobody comes too early."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(milliseconds / 1000), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
