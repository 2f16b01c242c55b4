"""Admission, controller and batchers in virtual time: what they make of a load. Only steps and handoffs are modelled.

Small on purpose: one gateway, no failures, and calls take no time. Deterministic: equal times are handled in the order
in which they were entered.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from scheduler.admission import AdmissionControl, AdmissionOptions
from scheduler.cache_index import hashes_of_prompt
from scheduler.controller import ClusterController
from scheduler.cost_model import CostModel
from scheduler.events import (
    Command,
    Event,
    PlaceRequest,
    PrefillDone,
    RefuseRequest,
    RequestArrived,
    RequestEnded,
    Tick,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.placement import PlacementOptions
from scheduler.request import Request
from scheduler.sim.workers import SimulatedRequest, SimulatedWorker, prompt_of
from scheduler.step_plan import SampledToken, StepPlan
from scheduler.types import Placement, WorkerInfo

HEARTBEAT_S = 0.5
_NO_LIMIT = 1 << 30
_Action = Callable[[], None]


@dataclass(slots=True)
class VirtualTime:
    """Actions by when they happen."""

    now: float = 0.0
    _actions: list[tuple[float, int, _Action]] = field(default_factory=list)
    _num_entered: int = 0

    def at(self, time_s: float, action: _Action) -> None:
        self._num_entered += 1
        heapq.heappush(self._actions, (time_s, self._num_entered, action))

    def after(self, seconds: float, action: _Action) -> None:
        self.at(self.now + seconds, action)

    def run_until(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self.now, _, action = heapq.heappop(self._actions)
            action()


class Simulator:
    """Runs requests over workers.

    Args:
        tokens_per_name: prompt tokens that one name of ``SimulatedRequest.names`` stands for.
        max_tokens: what clients ask for at most; how long an answer will be the scheduler learns at its end.
        admission: None: the targets of ``options``, and a queue without end.
    """

    def __init__(
        self,
        workers: Sequence[WorkerInfo],
        options: PlacementOptions,
        tokens_per_name: int,
        max_tokens: int,
        admission: AdmissionOptions | None = None,
    ) -> None:
        self.time = VirtualTime()
        self._targets = targets = options.ttft_target_s, options.tpot_target_s
        self.controller = ClusterController(options=options)
        self._admission = AdmissionControl(self.controller, admission or AdmissionOptions(_NO_LIMIT, *targets))
        self._costs = CostModel()
        self._tokens_per_name = tokens_per_name
        self._max_tokens = max_tokens
        self.workers: dict[str, SimulatedWorker] = {}
        self._requests: dict[str, SimulatedRequest] = {}  # that have arrived and not ended
        self._prompts: dict[str, tuple[int, ...]] = {}  # of them
        self._num_arrived = 0
        self._num_open = 0
        for info in workers:
            self.join(info)
        self._beat()

    def join(self, info: WorkerInfo) -> None:
        """A worker comes, at the beginning or while requests run."""
        self._costs.add(info)
        self.workers[info.worker_id] = SimulatedWorker(info, self._costs, *self._targets)
        self._tell(WorkerRegistered(info))

    def run(self, requests: Sequence[SimulatedRequest]) -> None:
        """Until all have ended, or were refused. No block may be left held."""
        self._num_open = len(requests)
        for request in requests:
            self.time.at(request.arrival_s, partial(self._arrive, request))
        self.time.run_until(lambda: self._num_open == 0)
        for worker in self.workers.values():
            worker.batcher.manager.check_idle()

    def _tell(self, event: Event) -> None:
        for command in self._admission.handle(event, self.time.now):
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case PlaceRequest():
                self._start(self._requests[command.placement.request_id], command.placement)
            case RefuseRequest():
                request = self._requests[command.request_id]
                request.refused_s = self.time.now
                self._forget(request)

    def _beat(self) -> None:
        for worker_id, worker in self.workers.items():
            delta = worker.take_cache_news()
            self._tell(WorkerReported(worker_id, worker.info.incarnation, worker.load(), cache=delta))
        self._tell(Tick())
        self.time.after(HEARTBEAT_S, self._beat)

    def _arrive(self, request: SimulatedRequest) -> None:
        prompt = prompt_of(request, self._num_arrived, self._tokens_per_name)
        self._num_arrived += 1
        self._requests[request.request_id], self._prompts[request.request_id] = request, prompt
        sizes = dict.fromkeys(worker.info.spec.block_size for worker in self.workers.values())
        hashes = tuple(hashes_of_prompt(b"", size, prompt) for size in sizes)
        self._tell(
            RequestArrived(
                request.request_id,
                request.num_prompt_tokens,
                self._max_tokens,
                prefixes=hashes,
                tenant=request.tenant,
                urgency=request.urgency,
            )
        )

    def _start(self, request: SimulatedRequest, placement: Placement) -> None:
        """Its decode worker takes it first, and has it prefilled elsewhere once there is room for its KV."""
        request.placement = placement
        decode = self.workers[placement.decode.worker_id]
        prompt = self._prompts[request.request_id]
        decode.add(request, prompt, self._max_tokens, remote_prefill=placement.prefill is not None)
        self._go_on(decode)

    def _go_on(self, worker: SimulatedWorker) -> None:
        """As ``workers.step_loop``: handoffs begin at any time, steps after each other."""
        for reserved in worker.batcher.reserve_handoffs():
            self._prefill(self._requests[reserved.request_id])
        if worker.is_stepping:
            return
        plan = worker.plan()
        if plan is not None:
            self.time.after(worker.begin_step(plan), lambda: self._end_step(worker, plan))

    def _prefill(self, request: SimulatedRequest) -> None:
        placement = request.placement
        assert placement is not None and placement.prefill is not None, "it was placed on two workers"
        worker = self.workers[placement.prefill.worker_id]
        worker.add(request, self._prompts[request.request_id], self._max_tokens, prefill_only=True)
        self._go_on(worker)

    def _end_step(self, worker: SimulatedWorker, plan: StepPlan) -> None:
        sampling = (self._requests[chunk.request_id] for chunk in plan.chunks if chunk.sampling is not None)
        for sampled in worker.end_step(plan, sampling):
            if sampled.request.prefill_only:
                self._hand_over(sampled.request, worker)
            else:
                self._take_token(sampled)
        self._go_on(worker)

    def _hand_over(self, prefilled: Request, prefill: SimulatedWorker) -> None:
        request = self._requests[prefilled.request_id]
        assert request.placement is not None, "it is computed where it was placed"
        decode = self.workers[request.placement.decode.worker_id]
        waiting = decode.batcher.find(request.request_id)
        assert waiting is not None, "nobody aborts"
        missing = request.num_prompt_tokens - waiting.num_computed_tokens
        seconds = self._costs.transfer_seconds(prefill.info.worker_id, decode.info.worker_id, missing)
        self.time.after(seconds, lambda: self._attach(prefilled, prefill, decode))

    def _attach(self, prefilled: Request, prefill: SimulatedWorker, decode: SimulatedWorker) -> None:
        token = prefilled.token_ids[-1]
        prefill.batcher.complete_handoff(prefilled.request_id)
        self._take_token(decode.batcher.attach(prefilled.request_id, token, prefilled.num_cached_tokens))
        self._go_on(prefill)
        self._go_on(decode)

    def _take_token(self, sampled: SampledToken) -> None:
        request = self._requests[sampled.request.request_id]
        request.num_generated_tokens += 1
        if request.num_generated_tokens == 1:
            request.first_token_s = self.time.now
            request.num_cached_tokens = sampled.request.num_cached_tokens
            self._tell(PrefillDone(request.request_id))
        if sampled.finish_reason is not None:
            request.finished_s = self.time.now
            self._forget(request)
            count = request.num_generated_tokens
            self._tell(RequestEnded(request.request_id, count, count))

    def _forget(self, request: SimulatedRequest) -> None:
        self._num_open -= 1
        del self._requests[request.request_id], self._prompts[request.request_id]
