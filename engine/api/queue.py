"""``GET /v1/queue/{request_id}``: where a request stands that has not ended."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request, Response

from engine.api.middleware import caller_of
from engine.api.openapi import plain_responses
from engine.api.replies import JsonReply, QueueReply
from engine.api.serving import TICKET_HEADER, Serving


def queue_router(serving: Serving) -> APIRouter:
    """The route, bound to one engine."""
    router = APIRouter()

    @router.get("/v1/queue/{request_id}", response_model=None, responses=plain_responses(QueueReply))
    async def queue_place(request_id: str, request: Request) -> Response:
        """Of the caller's own requests, by the X-Request-Id that it sent with one."""
        place = serving.engine.queue_place(caller_of(request).tenant, request_id)
        if place is None:
            raise HTTPException(404, f"no request of yours under way was sent with this {TICKET_HEADER}")
        return JsonReply(QueueReply(request_id, "running" if place.position is None else "waiting", place.position))

    return router
