"""Admission, controller and batcher in virtual time: all decisions are real, only the model's steps are not.

One worker does both phases. A step takes as long as the cost model predicts of a worker that nothing was learned of.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

from kvcache.manager import KVCacheManager
from scheduler.admission import AdmissionControl, AdmissionOptions
from scheduler.batching import Batcher, BatchLimits
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
    WorkerRegistered,
)
from scheduler.placement import PlacementOptions
from scheduler.request import Request
from scheduler.step_plan import StepOutput, StepPlan
from scheduler.types import WorkerInfo
from scheduler.urgency import ORDINARY, Urgency
from tests.builders import make_sampling, make_spec, make_worker

LIMITS = BatchLimits(max_num_seqs=8, max_num_batched_tokens=32, max_num_waiting=100_000)
NUM_BLOCKS = 512


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it; times in virtual seconds."""

    tenant: str
    urgency: Urgency
    arrived_s: float
    placed_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    refused_s: float | None = None
    retry_after_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.arrived_s

    @property
    def gaps_s(self) -> list[float]:
        times = self.token_times_s
        return [later - earlier for earlier, later in pairwise(times)]


def slow_worker() -> WorkerInfo:
    """A step reads weights for 36 ms; a prompt token takes 2 ms."""
    info = make_worker("w", gemm_gflop_s=100.0, read_gb_s=10.0)
    shape = replace(info.shape, weight_bytes=3.2e8, head_bytes=4e7, linear_flops=1.9e8, head_flops=1e7)
    return replace(
        info,
        shape=shape,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=LIMITS.max_num_seqs,
        max_num_batched_tokens=LIMITS.max_num_batched_tokens,
    )


class ClusterSim:
    """Runs until nothing happens any more, or until a time."""

    def __init__(self, admission: AdmissionOptions) -> None:
        self.now = 0.0
        self.outcomes: dict[str, Outcome] = {}
        self.longest_queue = 0
        placement = PlacementOptions("least_loaded", admission.ttft_target_s, admission.tpot_target_s)
        self.admission = AdmissionControl(ClusterController(options=placement), admission)
        info = slow_worker()
        self._truth = CostModel()
        self._truth.add(info)
        manager = KVCacheManager(make_spec(), NUM_BLOCKS, prefix_caching=False)
        self.batcher = Batcher(manager, LIMITS)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._is_stepping = False
        self._arrivals: dict[str, RequestArrived] = {}
        self._tell(WorkerRegistered(info))

    def arrive(
        self, at_s: float, num_prompt_tokens: int, max_tokens: int, urgency: Urgency = ORDINARY, tenant: str = "a"
    ) -> str:
        """A request that will come at that time; its id."""
        request_id = f"r{next(self._numbers)}"
        event = RequestArrived(request_id, num_prompt_tokens, max_tokens, tenant=tenant, urgency=urgency)
        self._at(at_s, lambda: self._arrive(event))
        return request_id

    def run(self, until_s: float = float("inf")) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
            self._step()
        self.batcher.manager.check_integrity()

    def _arrive(self, event: RequestArrived) -> None:
        self.outcomes[event.request_id] = Outcome(event.tenant, event.urgency, self.now)
        self._arrivals[event.request_id] = event
        self._tell(event)

    def _tell(self, event: Event) -> None:
        for command in self.admission.handle(event, self.now):
            self._obey(command)
        snapshot = self.admission.snapshot()
        self.longest_queue = max(self.longest_queue, snapshot.queued_interactive + snapshot.queued_batch)

    def _obey(self, command: Command) -> None:
        match command:
            case PlaceRequest():
                request_id = command.placement.request_id
                event = self._arrivals.pop(request_id)
                prompt = tuple(range(1, event.num_prompt_tokens + 1))
                self.outcomes[request_id].placed_s = self.now
                self.batcher.add(Request(request_id, prompt, make_sampling(event.max_tokens), urgency=event.urgency))
            case RefuseRequest():
                del self._arrivals[command.request_id]
                outcome = self.outcomes[command.request_id]
                outcome.refused_s, outcome.retry_after_s = self.now, command.retry_after_s

    def _step(self) -> None:
        plan = None if self._is_stepping else self.batcher.plan()
        if plan is not None:
            self._is_stepping = True
            self._at(self.now + self._seconds(plan), lambda: self._end_step(plan))

    def _seconds(self, plan: StepPlan) -> float:
        decoding = [chunk for chunk in plan.chunks if not chunk.num_prompt_tokens]
        prompt_tokens = sum(chunk.num_prompt_tokens for chunk in plan.chunks)
        seconds = 0.0
        if decoding:
            context = sum(chunk.end for chunk in decoding)
            seconds += self._truth.decode_step_seconds("w", len(decoding), context)
        if prompt_tokens:
            seconds += self._truth.prefill_seconds("w", prompt_tokens)
        return seconds

    def _end_step(self, plan: StepPlan) -> None:
        self._is_stepping = False
        output = StepOutput({chunk.request_id: 7 for chunk in plan.chunks if chunk.sampling is not None})
        for sampled in self.batcher.apply(plan, output):
            request_id = sampled.request.request_id
            outcome = self.outcomes[request_id]
            outcome.token_times_s.append(self.now)
            if len(outcome.token_times_s) == 1:
                self._tell(PrefillDone(request_id))
            if sampled.finish_reason is not None:
                outcome.ended_s = self.now
                num_tokens = len(outcome.token_times_s)
                self._tell(RequestEnded(request_id, num_tokens, num_tokens))

    def _at(self, time_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), happen))
