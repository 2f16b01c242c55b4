"""Every failure as OpenAI's error object, with the status that tells a client what to do about it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from engine.api.fields import field_path
from engine.api.replies import ErrorDetail, ErrorReply, JsonReply
from kvcache.errors import (
    OverloadedError,
    RateLimitError,
    RequestError,
    TransferError,
    TwinpoolError,
    UnavailableError,
    UnknownModelError,
)

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
MAX_MESSAGE_LENGTH = 1000

_HTTP_CODES = {
    400: "bad_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    429: "rate_limit_exceeded",
}

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The request can never succeed as it stands"},
    401: {"model": ErrorReply, "description": "No API key, or a wrong one"},
    404: {"model": ErrorReply, "description": "No such model"},
    413: {"model": ErrorReply, "description": "The body is too large"},
    429: {"model": ErrorReply, "description": "Over a limit, named by type; try again after Retry-After seconds"},
    500: {"model": ErrorReply, "description": "A bug in the server"},
    503: {"model": ErrorReply, "description": "No room or no worker now; try again after Retry-After seconds"},
    "default": {"model": ErrorReply, "description": "Any other error"},
}
"""What every route of a model may answer, for OpenAPI."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way to the client, as an HTTP reply or as a frame of a stream."""

    status: int
    reply: ErrorReply
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self) -> JsonReply:
        return JsonReply(self.reply, status_code=self.status, headers=dict(self.headers))


def failure(
    status: int,
    message: str,
    kind: str = INVALID_REQUEST,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Failure:
    """Builds one. The message is cut, because it may quote what the client sent."""
    readable = message[:MAX_MESSAGE_LENGTH].encode("utf-8", "replace").decode()  # lone surrogates are no JSON
    return Failure(status, ErrorReply(ErrorDetail(readable, kind, param, code)), headers or {})


def describe(error: Exception) -> Failure:
    """The failure that an exception amounts to. Whatever is not ours is a bug: logged here, told to nobody."""
    match error:
        case UnknownModelError():
            return failure(404, error.message, param=error.param, code="model_not_found")
        case RequestError():
            return failure(400, error.message, param=error.param, code="invalid_value")
        case RateLimitError():
            headers = {"Retry-After": _seconds(error.retry_after_s)}
            return failure(429, error.message, error.limit, code="rate_limit_exceeded", headers=headers)
        case UnavailableError():
            return _try_again(error.message, "unavailable", error.retry_after_s)
        case OverloadedError():
            return _try_again(error.message, "overloaded", error.retry_after_s)
        case TransferError():
            return _try_again("the KV cache of this request was lost on its way between two workers", "unavailable", 1)
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            return _http(error)
    logger.error("a request failed by a bug", exc_info=error)
    headers = {"x-should-retry": "false"}
    return failure(
        500, "internal error; the server's log has the details", "server_error", None, "internal_error", headers
    )


def add_error_handlers(app: FastAPI) -> None:
    """All known errors of all routes. Unknown ones go to ``engine.api.middleware.ErrorBoundary``."""

    async def handle(_request: Request, error: Exception) -> JsonReply:
        return describe(error).response()

    for kind in (TwinpoolError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def _try_again(message: str, code: str, retry_after_s: float) -> Failure:
    return failure(503, message, "service_unavailable_error", None, code, {"Retry-After": _seconds(retry_after_s)})


def _seconds(retry_after_s: float) -> str:
    """Whole ones, as HTTP wants them."""
    return str(max(1, math.ceil(retry_after_s)))


def _http(error: HTTPException) -> Failure:
    """404 for a path and 405 for a method come from the router, 413 from the body limit."""
    code = _HTTP_CODES.get(error.status_code)
    return failure(error.status_code, error.detail, code=code, headers=error.headers)


def _invalid(errors: Sequence[Any]) -> Failure:
    """The first of pydantic's errors, in the user's words for the place."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "cannot be read")
        return failure(400, f"the body is not valid JSON: {reason} (character {first['loc'][-1]})", code="invalid_json")
    location = list(first["loc"])
    if location and location[0] in ("body", "query", "path", "header"):
        location = location[1:]
    param = field_path(location)
    message = f"{param or 'the body'}: {first['msg']}"
    if param is None and first["type"] in ("missing", "model_attributes_type"):
        message = "the body must be a JSON object, sent with Content-Type: application/json"
    return failure(400, message, param=param, code="invalid_value")
