"""Routes about the server itself."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from engine.api.errors import ERROR_RESPONSES
from engine.api.openapi import plain_responses
from engine.api.replies import JsonReply, ModelCard, ModelList, StatusReply
from engine.api.serving import Serving
from kvcache.errors import UnavailableError
from scheduler.types import ClusterSnapshot


def probes_router(serving: Serving) -> APIRouter:
    """What load balancers and Kubernetes ask; never needs a key."""
    router = APIRouter()

    async def alive() -> Response:
        """The process answers."""
        return JsonReply(StatusReply("ok"))

    for path in ("/health", "/live"):
        router.get(path, response_model=None, responses={200: {"model": StatusReply}})(alive)

    @router.get("/ready", response_model=None, responses={200: {"model": StatusReply}, 503: ERROR_RESPONSES[503]})
    async def ready() -> Response:
        """There are workers that a request can be placed on."""
        if not serving.engine.ready:
            raise UnavailableError("there are no workers yet that a request can be placed on")
        return JsonReply(StatusReply("ready"))

    return router


def status_router(serving: Serving) -> APIRouter:
    """What clients and operators ask."""
    router = APIRouter()

    def cards() -> tuple[ModelCard, ...]:
        model = serving.engine.model
        return tuple(ModelCard(name, model.created, model.max_model_len) for name in model.names)

    @router.get("/v1/models", response_model=None, responses=plain_responses(ModelList))
    async def list_models() -> Response:
        """Every name that a request may use."""
        return JsonReply(ModelList(cards()))

    @router.get("/v1/models/{name:path}", response_model=None, responses=plain_responses(ModelCard))
    async def retrieve_model(name: str) -> Response:
        """One of them."""
        serving.model_named(name)
        return JsonReply(next(card for card in cards() if card.id == name))

    @router.get("/cluster", response_model=None, responses=plain_responses(ClusterSnapshot))
    async def cluster() -> Response:
        """All workers, as ``twinpool status`` shows them."""
        return JsonReply(serving.engine.cluster)

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(serving.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return router
