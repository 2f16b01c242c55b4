"""The controller itself in virtual time, over modelled workers: what a placement policy makes of a load.

Small on purpose: one gateway, no failures, and calls take no time. Deterministic: equal times are handled in the order
in which they were entered.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from scheduler.controller import ClusterController
from scheduler.cost_model import CostModel
from scheduler.events import (
    Event,
    PlaceRequest,
    PrefillDone,
    RequestArrived,
    RequestEnded,
    Tick,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.placement import PlacementOptions
from scheduler.sim.workers import SimulatedRequest, SimulatedWorker
from scheduler.types import PrefixHashes, WorkerInfo

HEARTBEAT_S = 0.5
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
    """

    def __init__(
        self, workers: Sequence[WorkerInfo], options: PlacementOptions, tokens_per_name: int, max_tokens: int
    ) -> None:
        self.time = VirtualTime()
        self._controller = ClusterController(options=options)
        self._costs = CostModel()
        self._tokens_per_name = tokens_per_name
        self._max_tokens = max_tokens
        self.workers = {info.worker_id: SimulatedWorker(info, self._costs, tokens_per_name) for info in workers}
        self._num_open = 0
        for info in workers:
            self._costs.add(info)
            self._tell(WorkerRegistered(info))
        self._beat()

    def run(self, requests: Sequence[SimulatedRequest]) -> None:
        """Until all have ended.

        Raises:
            UnavailableError: the workers cannot take one of them.
        """
        self._num_open = len(requests)
        for request in requests:
            self.time.at(request.arrival_s, partial(self._arrive, request))
        self.time.run_until(lambda: self._num_open == 0)

    def _tell(self, event: Event) -> None:
        self._controller.handle(event, self.time.now)

    def _beat(self) -> None:
        for worker_id, worker in self.workers.items():
            report = WorkerReported(worker_id, worker.info.incarnation, worker.load(), cache=worker.cache.take_news())
            self._tell(report)
        self._tell(Tick())
        self.time.after(HEARTBEAT_S, self._beat)

    def _arrive(self, request: SimulatedRequest) -> None:
        sizes = dict.fromkeys(worker.info.spec.block_size for worker in self.workers.values())
        hashes = tuple(PrefixHashes(size, self._tokens_per_name, request.names[::-1]) for size in sizes)
        arrived = RequestArrived(request.request_id, request.num_prompt_tokens, self._max_tokens, prefixes=hashes)
        (command,) = self._controller.handle(arrived, self.time.now)
        assert isinstance(command, PlaceRequest), "the cluster has both phases, and nobody leaves"
        request.placement = placement = command.placement
        worker = self.workers[(placement.prefill or placement.decode).worker_id]
        worker.prompts.append(request)
        self._go_on(worker)

    def _go_on(self, worker: SimulatedWorker) -> None:
        if worker.is_stepping:
            return
        for request in worker.admit():
            self._first_token(request)
        if worker.has_work:
            self.time.after(worker.begin_step(), lambda: self._end_step(worker))

    def _end_step(self, worker: SimulatedWorker) -> None:
        decoded, prompt = worker.end_step()
        for request in decoded:
            if request.is_complete:
                self._end(request)
        if prompt is not None:
            self._hand_over(prompt)
        self._go_on(worker)

    def _hand_over(self, request: SimulatedRequest) -> None:
        assert request.placement is not None, "it is computed where it was placed"
        prefill, decode = request.placement.prefill, self.workers[request.placement.decode.worker_id]
        if prefill is None:
            decode.arrived.append(request)
            return  # its worker is between two steps, and goes on
        missing = request.num_prompt_tokens - decode.cached_tokens(request)
        seconds = self._costs.transfer_seconds(prefill.worker_id, decode.info.worker_id, missing)
        self.time.after(seconds, lambda: self._attach(request, decode))

    def _attach(self, request: SimulatedRequest, decode: SimulatedWorker) -> None:
        decode.arrived.append(request)
        self._go_on(decode)

    def _first_token(self, request: SimulatedRequest) -> None:
        request.first_token_s = self.time.now
        self._tell(PrefillDone(request.request_id))
        if request.is_complete:
            self._end(request)

    def _end(self, request: SimulatedRequest) -> None:
        request.finished_s = self.time.now
        self._num_open -= 1
        self._tell(RequestEnded(request.request_id, request.num_output_tokens))
