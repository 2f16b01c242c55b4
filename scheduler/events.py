"""What the controller hears, and what follows from it. Frozen dataclasses: they cross processes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from scheduler.messages import message
from scheduler.tenants import DEFAULT_TENANT
from scheduler.types import (
    ACTIVE,
    CacheDelta,
    Duty,
    Placement,
    PrefixHashes,
    StepTimes,
    TransferTimes,
    WorkerInfo,
    WorkerLoad,
    WorkerRole,
)
from scheduler.urgency import ORDINARY, Urgency


@message
@dataclass(frozen=True, slots=True)
class WorkerRegistered:
    info: WorkerInfo
    duty: Duty = ACTIVE  # what it was told last, maybe by a scheduler of which this one knows nothing


@message
@dataclass(frozen=True, slots=True)
class WorkerReported:
    """A heartbeat."""

    worker_id: str
    incarnation: int
    load: WorkerLoad
    steps: tuple[StepTimes, ...] = ()  # since the heartbeat before
    transfers: tuple[TransferTimes, ...] = ()
    cache: CacheDelta | None = None  # None: nothing changed


@message
@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """Stopped on purpose."""

    worker_id: str
    incarnation: int


@message
@dataclass(frozen=True, slots=True)
class WorkersExpected:
    """All workers that there shall be."""

    worker_ids: tuple[str, ...]


@message
@dataclass(frozen=True, slots=True)
class DrainWorker:
    """No new requests for it; told by an operator, by a fleet that shrinks, or by the worker itself, which will end."""

    worker_id: str
    force: bool = False  # even if nobody else takes its phase
    move_after_s: float | None = None  # None: as the server was told (``PlacementOptions.move_after_s``)


@message
@dataclass(frozen=True, slots=True)
class ActivateWorker:
    """The end of a drain, whether or not it is done."""

    worker_id: str


@message
@dataclass(frozen=True, slots=True)
class ChangeRole:
    """To the other pool, once what runs there has ended."""

    worker_id: str
    role: WorkerRole
    move_after_s: float | None = None  # as of a drain


@message
@dataclass(frozen=True, slots=True)
class RequestArrived:
    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    avoid: tuple[str, ...] = ()  # ids of workers that it has failed on already; others are preferred
    stay_on: str = ""  # id of the decode worker that has part of its KV from a handoff that broke
    prefixes: tuple[PrefixHashes, ...] = ()  # one for each block size in the cluster
    tenant: str = DEFAULT_TENANT
    urgency: Urgency = ORDINARY
    is_continued: bool = False  # it was placed before and lost its worker: it does not wait again
    waited_s: float = 0.0  # in another's line: of whom the scheduler was away, or who stood in for it


@message
@dataclass(frozen=True, slots=True)
class RequestPlaced:
    """Where a request runs that this scheduler has not placed, or has forgotten with a restart."""

    placement: Placement
    num_prompt_tokens: int
    max_tokens: int
    is_prefilled: bool  # its first token is out
    tenant: str = DEFAULT_TENANT
    urgency: Urgency = ORDINARY


@message
@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The first token is out: the prefill worker has no more work with this request."""

    request_id: str


@message
@dataclass(frozen=True, slots=True)
class RequestEnded:
    """Finished, failed or aborted."""

    request_id: str
    num_output_tokens: int = 0  # of one that finished; 0: says nothing of how long answers are
    num_delivered_tokens: int = 0  # however it ended: what its tenant is charged


@message
@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed and nothing else."""

    num_queued: int = 0  # interactive requests that admission has not placed yet, which is who says so


Event = (
    WorkerRegistered
    | WorkerReported
    | WorkerLeft
    | WorkersExpected
    | DrainWorker
    | ActivateWorker
    | ChangeRole
    | RequestArrived
    | RequestPlaced
    | PrefillDone
    | RequestEnded
    | Tick
)


@message
@dataclass(frozen=True, slots=True)
class PlaceRequest:
    placement: Placement


@message
@dataclass(frozen=True, slots=True)
class RequestQueued:
    """It waits; its placement or refusal will be a later command. Asking again tells the place again."""

    request_id: str
    position: int  # how many are before it; of a newcomer about so many, where several tenants wait


class Refusal(StrEnum):
    """Why a request was refused. The value is the metric label."""

    UNAVAILABLE = "unavailable"  # no worker for a phase
    QUEUE_FULL = "queue_full"
    TTFT_TARGET = "ttft_target"  # its first token cannot come in time


@message
@dataclass(frozen=True, slots=True)
class RefuseRequest:
    request_id: str
    message: str
    reason: Refusal = Refusal.UNAVAILABLE
    retry_after_s: float = 1.0


@message
@dataclass(frozen=True, slots=True)
class RefuseWorker:
    """The worker must not serve: it does not fit the cluster. ``message`` names the field."""

    worker_id: str
    message: str
    is_final: bool  # False: it may try again later


@message
@dataclass(frozen=True, slots=True)
class AskToRegister:
    """A heartbeat from a worker that is not known here, e.g. after a restart of the scheduler."""

    worker_id: str


@message
@dataclass(frozen=True, slots=True)
class AskForCache:
    """A delta of the worker's cached blocks was lost: it shall begin anew, with all of them."""

    worker_id: str


@message
@dataclass(frozen=True, slots=True)
class BeatEvery:
    """How often a worker shall report from now on, until it registers anew."""

    worker_id: str
    interval_s: float


@message
@dataclass(frozen=True, slots=True)
class TakeDuty:
    """What a worker is to do from now on; it keeps it, and says it when it registers again."""

    worker_id: str
    role: WorkerRole
    duty: Duty


@message
@dataclass(frozen=True, slots=True)
class RefuseDuty:
    """What an operator asked for is not done."""

    worker_id: str
    message: str


@message
@dataclass(frozen=True, slots=True)
class WorkerRemoved:
    worker_id: str
    message: str


Command = (
    PlaceRequest
    | RequestQueued
    | RefuseRequest
    | RefuseWorker
    | AskToRegister
    | AskForCache
    | BeatEvery
    | TakeDuty
    | RefuseDuty
    | WorkerRemoved
)
