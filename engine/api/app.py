"""The HTTP surface: OpenAI's routes on top of a ``TextEngine``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Depends, FastAPI

from engine.api.admin import ClusterAdmin, admin_router
from engine.api.chat import chat_router
from engine.api.completions import completions_router
from engine.api.errors import add_error_handlers
from engine.api.middleware import AdminKey, ApiKeys, BodyLimit, Caller, ErrorBoundary
from engine.api.openapi import bearer
from engine.api.queue import queue_router
from engine.api.rate_limits import RateLimitHeaders
from engine.api.serving import Serving
from engine.api.status import probes_router, status_router
from engine.api.tokens import tokens_router
from engine.cache_salt import identity_of_key, identity_of_tenant
from engine.metrics import Metrics
from engine.outputs import TextEngine
from engine.tenant_desk import TenantDesk
from engine.tenants import Tenants

MAX_BODY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class AdminAccess:
    admin: ClusterAdmin
    key: str


def create_app(
    engine: TextEngine,
    *,
    api_keys: Sequence[str] = (),
    tenants: Tenants = Tenants(),  # noqa: B008  frozen
    metrics: Metrics,
    admin: AdminAccess | None = None,
) -> FastAPI:
    """The ASGI application of one engine, which stays the caller's to start and to stop.

    With ``api_keys`` or keys of tenants, every path but the probes needs one of them; admin calls, where there are any,
    need their own.
    """
    app = FastAPI(title="Twinpool", docs_url=None, redoc_url=None, openapi_url="/openapi.json", redirect_slashes=False)
    desk = TenantDesk(tenants.tenants, metrics)
    serving = Serving(engine, metrics, desk)
    app.include_router(probes_router(serving))
    for make_router in (completions_router, chat_router, tokens_router, queue_router, status_router):
        app.include_router(make_router(serving), dependencies=[Depends(bearer)])
    if admin is not None:
        app.include_router(admin_router(admin.admin), dependencies=[Depends(bearer)])
    add_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)  # the last one added is the outermost
    app.add_middleware(RateLimitHeaders, book=desk)
    callers = {key: Caller(identity_of_key(key)) for key in api_keys}
    callers |= {each.key: Caller(identity_of_tenant(each.tenant), each.tenant) for each in tenants.keys}
    if callers:
        app.add_middleware(ApiKeys, callers=callers)
    if admin is not None:
        app.add_middleware(AdminKey, key=admin.key)
    app.add_middleware(ErrorBoundary)
    return app
