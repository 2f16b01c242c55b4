"""What every placement policy is given, and what it answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvcache.errors import UnavailableError
from scheduler.cache_index import CacheIndex
from scheduler.events import RequestArrived
from scheduler.types import Phase, WorkerRole
from scheduler.worker_state import WorkerState
from scheduler.worker_table import Grouping, Ranking, WorkerTable

DEFAULT_POLICY = "cost"
TTFT_TARGET_S = 2.0
TPOT_TARGET_S = 0.1
_COLOCATED = WorkerRole.COLOCATED
NUM_HOLDERS = 4  # workers with a cached prefix that are looked at, for one request and block size


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """What operators choose. The gateway places by the same ones while the scheduler is away."""

    policy: str = DEFAULT_POLICY
    ttft_target_s: float = TTFT_TARGET_S
    tpot_target_s: float = TPOT_TARGET_S
    seed: int = 0  # of the policies that draw
    roles_follow_load: bool = False  # workers change between prefill and decode
    move_after_s: float | None = None  # of every drain that says nothing else; see ``Duty``


class Choice:
    """Where a request shall run. ``prefill`` is None for prefill in place, on the decode worker. Do not change it.

    Args:
        num_cached_tokens: of the prompt, where it is computed; None: the policy did not look.
        prefill_s: predicted to compute it there, beside as many neighbours as mostly; None: it did not predict.
    """

    __slots__ = ("decode", "num_cached_tokens", "prefill", "prefill_s", "prefills")

    def __init__(
        self,
        decode: WorkerState,
        prefill: WorkerState | None = None,
        num_cached_tokens: int | None = None,
        prefill_s: float | None = None,
    ) -> None:
        self.decode = decode
        self.prefill = prefill
        self.num_cached_tokens = num_cached_tokens
        self.prefill_s = prefill_s
        self.prefills = prefill or decode  # the worker that computes the prompt


@dataclass(frozen=True, slots=True)
class Cluster:
    """Everything a policy may look at. It changes nothing."""

    workers: WorkerTable
    cache: CacheIndex

    def taking(self, phase: Phase) -> Sequence[WorkerState]:
        """All workers of a phase, at least one.

        Raises:
            UnavailableError: there is none; names the phase.
        """
        workers = self.workers.taking(phase)
        if not workers:
            raise _unavailable(phase)
        return workers

    def bound_to(self, request: RequestArrived) -> WorkerState | None:
        """The decode worker that has part of the request's KV already, if it is alive."""
        worker = self.workers.get(request.stay_on) if request.stay_on else None
        return worker if worker is not None and worker.takes(Phase.DECODE) else None

    def best(self, phase: Phase, avoid: Collection[str]) -> list[WorkerState]:
        """The best worker of each group by the policy's ranking, at least one.

        Raises:
            UnavailableError: as ``taking``.
        """
        workers = self.workers.best(phase, avoid)
        if not workers:
            raise _unavailable(phase)
        return workers

    def holders(self, request: RequestArrived, limit: int) -> list[WorkerState]:
        """Active workers that have most of the prompt cached, up to ``limit`` for each block size."""
        ids: list[str] = []
        for prefix in request.prefixes:
            ids += self.cache.deepest(prefix, limit)
        return self.workers.active(ids, request.avoid)

    def cached_tokens(self, worker: WorkerState, request: RequestArrived) -> int:
        """Tokens of the prompt that need not be computed there, or not be sent there."""
        return self.cache.cached_tokens(worker.info, request.prefixes, request.num_prompt_tokens)


def _unavailable(phase: Phase) -> UnavailableError:
    return UnavailableError(f"No {phase.value} worker is available.")


@dataclass(frozen=True, slots=True)
class Outlook:
    """Predicted for one more request, on the workers where it would be soonest."""

    backlog_s: float  # until its prompt would be begun
    prefill_s: float  # its prompt, alone and with nothing cached
    step_s: float  # a token of those that decode beside it, at its worst; infinite where all decode workers are full
    num_prefill_workers: int


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Predicted for a request where it would be placed: computing what is not cached, and the handoff."""

    wait_s: float  # behind the prompts before it
    own_s: float

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.own_s


class PlacementPolicy(Protocol):
    """Chooses workers for one request after the other. It may keep a state, which only ``choose`` changes."""

    @property
    def phases(self) -> Sequence[Phase]:
        """Those for which it needs an active worker each."""
        ...

    @property
    def ranking(self) -> Ranking:
        """How the workers of a group are to be kept in order: for it, and for what admission asks of the soonest."""
        ...

    @property
    def grouping(self) -> Grouping: ...

    def choose(self, request: RequestArrived, num_output_tokens: int, cluster: Cluster, now: float) -> Choice:
        """
        Args:
            num_output_tokens: how long the answer is expected to be.

        Raises:
            UnavailableError: no active worker takes one of ``phases``; names it.
        """
        ...


def one_group(_worker: WorkerState) -> object:
    return None


def prefills_in_place(decode: WorkerState) -> bool:
    """A worker of both roles computes the prompts of what it decodes itself."""
    return decode.role is _COLOCATED


def can_hand_over(prefill: WorkerState, decode: WorkerState) -> bool:
    """Workers of two pools fit each other, or are refused; colocated ones need not."""
    if prefill is decode:
        return False
    if prefill.role is not _COLOCATED and decode.role is not _COLOCATED:
        return True
    return prefill.info.spec.obstacle(decode.info.spec) is None
