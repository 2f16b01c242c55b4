"""What OpenAPI says of the routes beyond their bodies."""

from __future__ import annotations

from typing import Any

from fastapi.security import HTTPBearer

from engine.api.errors import ERROR_RESPONSES

bearer = HTTPBearer(auto_error=False, description="One of the server's API keys, if it has any.")
"""Declares the scheme; ``engine.api.middleware.ApiKeys`` is what enforces it."""

_EVENT_STREAM = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
            "required": ["data"],
        }
    }
}


def answer_responses(reply: type) -> dict[int | str, dict[str, Any]]:
    """Of a route that answers with ``reply``, or streams it in chunks."""
    return {200: {"model": reply, "content": dict(_EVENT_STREAM), "description": "The answer"}, **ERROR_RESPONSES}


def plain_responses(reply: type) -> dict[int | str, dict[str, Any]]:
    """Of a route that answers with ``reply`` only."""
    return {200: {"model": reply, "description": "The answer"}, **ERROR_RESPONSES}
