"""The cluster as a pure state machine: events in, commands out, the time as an argument.

The Ray actor drives it with the wall's monotonic clock and real workers; a simulator can drive the very same
object with virtual time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvcache.errors import UnavailableError
from scheduler.cost_model import CostModel
from scheduler.placement import place_least_loaded
from scheduler.prediction import PredictionLog, Sizes, predict
from scheduler.types import (
    NO_ERRORS,
    ClusterSnapshot,
    Placement,
    PredictionErrors,
    StepTimes,
    TransferTimes,
    WorkerInfo,
    WorkerLoad,
    WorkerRole,
    WorkerSnapshot,
)


@dataclass(frozen=True, slots=True)
class WorkerRegistered:
    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerReported:
    """A heartbeat."""

    worker_id: str
    incarnation: int
    load: WorkerLoad
    steps: tuple[StepTimes, ...] = ()  # since the heartbeat before
    transfers: tuple[TransferTimes, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """Stopped on purpose."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class RequestArrived:
    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    avoid: tuple[str, ...] = ()  # ids of workers that it has failed on already; others are preferred
    stay_on: str = ""  # id of the decode worker that has part of its KV from a handoff that broke


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The first token is out: the prefill worker has no more work with this request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """Finished, failed or aborted."""

    request_id: str
    num_output_tokens: int = 0  # of one that finished; 0: says nothing of how long answers are


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed and nothing else."""


Event = WorkerRegistered | WorkerReported | WorkerLeft | RequestArrived | PrefillDone | RequestEnded | Tick


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    placement: Placement


@dataclass(frozen=True, slots=True)
class RefuseRequest:
    request_id: str
    message: str


@dataclass(frozen=True, slots=True)
class RefuseWorker:
    """The worker must not serve: it does not fit the cluster. ``message`` names the field."""

    worker_id: str
    message: str
    is_final: bool  # False: it may try again later


@dataclass(frozen=True, slots=True)
class AskToRegister:
    """A heartbeat from a worker that is not known here, e.g. after a restart of the scheduler."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class WorkerRemoved:
    worker_id: str
    message: str


Command = PlaceRequest | RefuseRequest | RefuseWorker | AskToRegister | WorkerRemoved


@dataclass(slots=True)
class _Worker:
    info: WorkerInfo
    last_heard_s: float
    load: WorkerLoad
    requests_placed: int = 0
    tokens_of: dict[str, int] = field(default_factory=dict)  # request id → its tokens in flight here
    tokens_in_flight: int = 0
    prefill_s_of: dict[str, float] = field(default_factory=dict)  # request id → predicted, until its first token
    free_at_s: float = 0.0  # when those prompts would be computed

    def take(self, request_id: str, num_tokens: int) -> None:
        self.tokens_of[request_id] = num_tokens
        self.tokens_in_flight += num_tokens
        self.requests_placed += 1

    def give_back(self, request_id: str) -> None:
        self.tokens_in_flight -= self.tokens_of.pop(request_id, 0)

    @property
    def batch_size(self) -> int:
        return len(self.tokens_of)

    @property
    def batch_context_tokens(self) -> int:
        return self.tokens_in_flight

    def backlog_s(self, now: float) -> float:
        return max(0.0, self.free_at_s - now)

    def begin_prefill(self, request_id: str, prefill_s: float, now: float) -> None:
        self.prefill_s_of[request_id] = prefill_s
        self.free_at_s = max(self.free_at_s, now) + prefill_s

    def end_prefill(self, request_id: str, now: float) -> None:
        """What is left are those that were placed after it."""
        if self.prefill_s_of.pop(request_id, None) is not None:
            self.free_at_s = now + sum(self.prefill_s_of.values())

    def snapshot(self, errors: PredictionErrors = NO_ERRORS) -> WorkerSnapshot:
        return WorkerSnapshot(
            self.info,
            self.load,
            len(self.tokens_of),
            self.tokens_in_flight,
            self.requests_placed,
            self.last_heard_s,
            errors,
        )


class ClusterController:
    """Knows the live workers and what was placed on them. No I/O, no clock, no randomness.

    Args:
        expected_workers: ids that were launched; those not registered are reported as missing.
        heartbeat_timeout_s: a worker not heard of for this long is taken for dead.
    """

    def __init__(self, expected_workers: Sequence[str] = (), heartbeat_timeout_s: float = 5.0) -> None:
        self._expected = tuple(expected_workers)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._workers: dict[str, _Worker] = {}
        self._placements: dict[str, Placement] = {}
        self._costs = CostModel()
        self._log = PredictionLog(self._costs)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Takes one event at monotonic time ``now`` (seconds) and says what follows from it."""
        match event:
            case RequestArrived():
                return [self._place(event, now)]
            case PrefillDone():
                self._log.first_token(event.request_id, now)
                self._end_prefill(event.request_id, now)
            case RequestEnded():
                self._log.end(event.request_id, event.num_output_tokens, now)
                self._end_request(event.request_id, now)
            case WorkerRegistered():
                return self._register(event.info, now)
            case WorkerReported():
                return self._report(event, now)
            case WorkerLeft():
                return self._remove(event.worker_id, event.incarnation, "it has left")
            case Tick():
                return self._remove_silent(now)
        return []

    def snapshot(self) -> ClusterSnapshot:
        workers = tuple(self._snapshot(self._workers[worker_id]) for worker_id in sorted(self._workers))
        return ClusterSnapshot(workers, tuple(name for name in self._expected if name not in self._workers))

    def _snapshot(self, worker: _Worker) -> WorkerSnapshot:
        return worker.snapshot(self._costs.errors(worker.info.worker_id))

    def _place(self, request: RequestArrived, now: float) -> Command:
        workers = (worker.snapshot() for worker in self._workers.values())
        try:
            placement = place_least_loaded(request.request_id, workers, request.avoid, request.stay_on)
        except UnavailableError as error:
            return RefuseRequest(request.request_id, error.message)
        self._placements[request.request_id] = placement
        self._predict(placement, request, now)
        decode_tokens = request.num_prompt_tokens + request.max_tokens
        self._workers[placement.decode.worker_id].take(request.request_id, decode_tokens)
        if placement.prefill is not None:
            self._workers[placement.prefill.worker_id].take(request.request_id, request.num_prompt_tokens)
        return PlaceRequest(placement)

    def _predict(self, placement: Placement, request: RequestArrived, now: float) -> None:
        decode = self._workers[placement.decode.worker_id]
        prefill = self._workers[placement.prefill.worker_id] if placement.prefill is not None else decode
        sizes = Sizes(request.num_prompt_tokens, request.max_tokens)
        prediction = predict(self._costs, placement, sizes, prefill, decode, now)
        self._log.begin(placement, prediction, now)
        prefill_s = self._costs.prefill_seconds(prefill.info.worker_id, sizes.prompt)
        prefill.begin_prefill(request.request_id, prefill_s, now)

    def _end_prefill(self, request_id: str, now: float) -> None:
        placement = self._placements.get(request_id)
        if placement is not None:
            worker = self._workers.get((placement.prefill or placement.decode).worker_id)
            if worker is not None:
                worker.end_prefill(request_id, now)
        if placement is not None and placement.prefill is not None:
            self._give_back(placement.prefill.worker_id, request_id)

    def _end_request(self, request_id: str, now: float) -> None:
        self._end_prefill(request_id, now)
        placement = self._placements.pop(request_id, None)
        if placement is not None:
            self._give_back(placement.decode.worker_id, request_id)

    def _give_back(self, worker_id: str, request_id: str) -> None:
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.give_back(request_id)

    def _register(self, info: WorkerInfo, now: float) -> list[Command]:
        problem = self._mismatch(info)
        if problem is not None:
            return [RefuseWorker(info.worker_id, problem, is_final=True)]
        known = self._workers.get(info.worker_id)
        if known is not None and known.info.incarnation > info.incarnation:
            return [RefuseWorker(info.worker_id, f"a newer process of {info.worker_id} is registered", is_final=False)]
        if known is not None and known.info == info:
            known.last_heard_s = now
        else:
            self._costs.add(info)
            self._workers[info.worker_id] = _Worker(info, now, WorkerLoad(blocks_free=info.num_blocks))
        return []

    def _mismatch(self, info: WorkerInfo) -> str | None:
        """Compares a newcomer with the workers it would exchange KV with."""
        for other in self._workers.values():
            if other.info.worker_id == info.worker_id:
                continue
            name = other.info.worker_id
            if other.info.model != info.model:
                return f"{info.worker_id} serves model {info.model!r} and {name} serves {other.info.model!r}"
            if other.info.vocab_size != info.vocab_size:
                return f"vocab_size of {info.worker_id} is {info.vocab_size} and that of {name} {other.info.vocab_size}"
            obstacle = info.spec.obstacle(other.info.spec)
            exchanges_kv = WorkerRole.COLOCATED not in (info.role, other.info.role)
            if exchanges_kv and obstacle is not None:
                return f"KV of {info.worker_id} and {name} cannot be exchanged: {obstacle}"
        return None

    def _report(self, event: WorkerReported, now: float) -> list[Command]:
        worker = self._workers.get(event.worker_id)
        if worker is None or worker.info.incarnation < event.incarnation:
            return [AskToRegister(event.worker_id)]
        if worker.info.incarnation == event.incarnation:
            worker.load = event.load
            worker.last_heard_s = now
            for steps in event.steps:
                self._costs.observe(event.worker_id, steps)
            for transfers in event.transfers:
                self._costs.observe_transfers(event.worker_id, transfers)
        return []

    def _remove_silent(self, now: float) -> list[Command]:
        silent = [
            worker.info for worker in self._workers.values() if now - worker.last_heard_s > self._heartbeat_timeout_s
        ]
        commands: list[Command] = []
        for info in silent:
            reason = f"no heartbeat for {self._heartbeat_timeout_s:g} s"
            commands += self._remove(info.worker_id, info.incarnation, reason)
        return commands

    def _remove(self, worker_id: str, incarnation: int, message: str) -> list[Command]:
        worker = self._workers.get(worker_id)
        if worker is None or worker.info.incarnation != incarnation:
            return []
        del self._workers[worker_id]
        self._costs.remove(worker_id)
        return [WorkerRemoved(worker_id, message)]
