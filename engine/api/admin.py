"""``/admin``: what operators tell a running cluster. Has a key of its own; see ``engine.api.middleware.AdminKey``."""

from __future__ import annotations

from typing import Annotated, Protocol

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from engine.api.openapi import plain_responses
from engine.api.replies import JsonReply
from scheduler.types import ClusterSnapshot, WorkerRole

MAX_WORKERS = 256


class ClusterAdmin(Protocol):
    """What ``engine.admin.Operator`` offers. All of it returns at once; the snapshot shows how far things are."""

    @property
    def cluster(self) -> ClusterSnapshot: ...

    async def drain(self, worker_id: str, *, force: bool, move_after_s: float | None) -> None: ...

    async def activate(self, worker_id: str) -> None: ...

    async def change_role(self, worker_id: str, role: WorkerRole, move_after_s: float | None) -> None: ...

    async def scale(self, counts: dict[WorkerRole, int]) -> None: ...


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


MoveAfter = Annotated[
    float | None,
    Field(
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description="What still decodes after so many seconds goes on at other workers, where there are any. Left out:"
        " as the server was told (--drain-timeout).",
    ),
]


class DrainBody(_Body):
    force: bool = Field(False, description="Even if nobody else takes its phase: requests then get 503.")
    move_after_s: MoveAfter = None


class RoleBody(_Body):
    role: str = Field(description="prefill or decode", pattern="^(prefill|decode)$")
    move_after_s: MoveAfter = None


class ScaleBody(_Body):
    """How many workers there shall be; what is left out stays."""

    prefill: int | None = Field(None, ge=0, le=MAX_WORKERS)
    decode: int | None = Field(None, ge=0, le=MAX_WORKERS)
    colocated: int | None = Field(None, ge=0, le=MAX_WORKERS)

    @property
    def counts(self) -> dict[WorkerRole, int]:
        return {role: count for role in WorkerRole if (count := getattr(self, role.value)) is not None}


def admin_router(admin: ClusterAdmin) -> APIRouter:
    """Each answers with the cluster as it is known at that moment: what was asked for may take a while."""
    router = APIRouter(prefix="/admin")
    responses = plain_responses(ClusterSnapshot)

    def snapshot() -> Response:
        return JsonReply(admin.cluster)

    @router.get("/cluster", response_model=None, responses=responses)
    async def cluster() -> Response:
        """All workers, and what each is to do."""
        return snapshot()

    @router.post("/workers/{worker_id}/drain", response_model=None, responses=responses)
    async def drain(worker_id: str, body: DrainBody) -> Response:
        """Nothing new for a worker: what runs there ends, and its KV is delivered."""
        await admin.drain(worker_id, force=body.force, move_after_s=body.move_after_s)
        return snapshot()

    @router.post("/workers/{worker_id}/activate", response_model=None, responses=responses)
    async def activate(worker_id: str) -> Response:
        """The end of a drain, before or after it is done."""
        await admin.activate(worker_id)
        return snapshot()

    @router.post("/workers/{worker_id}/role", response_model=None, responses=responses)
    async def change_role(worker_id: str, body: RoleBody) -> Response:
        """Drains a worker, and gives it the other role then."""
        await admin.change_role(worker_id, WorkerRole(body.role), body.move_after_s)
        return snapshot()

    @router.post("/scale", response_model=None, responses=responses)
    async def scale(body: ScaleBody) -> Response:
        """Starts workers, or drains and ends them."""
        await admin.scale(body.counts)
        return snapshot()

    return router
