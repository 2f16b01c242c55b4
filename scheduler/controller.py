"""The cluster as a pure state machine: events in, commands out, the time as an argument.

The Ray actor drives it with the wall's monotonic clock and real workers; a simulator drives the very same object with
virtual time, and a gateway whose scheduler is away places with one that it makes from its last snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf

from kvcache.errors import UnavailableError
from scheduler.batching import STEPS_PER_FIRST_TOKEN
from scheduler.cache_index import CacheIndex
from scheduler.cost_model import CostModel
from scheduler.demand import DemandMeter, candidates, pool_loads
from scheduler.duties import DutyBook
from scheduler.events import (
    ActivateWorker,
    AskForCache,
    AskToRegister,
    BeatEvery,
    ChangeRole,
    Command,
    DrainWorker,
    Event,
    PlaceRequest,
    PrefillDone,
    RefuseRequest,
    RefuseWorker,
    RequestArrived,
    RequestEnded,
    RequestPlaced,
    Tick,
    WorkerLeft,
    WorkerRegistered,
    WorkerRemoved,
    WorkerReported,
    WorkersExpected,
)
from scheduler.neighbours import Neighbours
from scheduler.pairing import PairingRules
from scheduler.placement import NUM_HOLDERS, Choice, Cluster, FirstToken, Outlook, PlacementOptions
from scheduler.planner import RolePlanner
from scheduler.policies import make_policy
from scheduler.prediction import PredictionLog, Sizes, predict
from scheduler.types import ClusterSnapshot, Phase, Placement, PoolLoad, StepTimes, WorkerLoad, WorkerRole
from scheduler.worker_state import HEARTBEAT_INTERVAL_S, WorkerState, Workload
from scheduler.worker_table import WorkerTable

PLAN_INTERVAL_S = 2.0
HEARTBEATS_PER_S = 200  # of all workers together, where the longest interval allows it
MAX_HEARTBEAT_INTERVAL_S = 5.0  # a restarted scheduler has its workers back within 10 s
_PACE_SLACK = 0.2  # a part of the interval by which it may be off: workers that come one by one change little
_MISSED_HEARTBEATS = 3
OUTPUT_TOKENS_GUESS = 128.0  # the length of an answer before any has ended
_OUTPUT_MEMORY = 0.02  # what the newest answer counts in the mean length


class _Placed(Workload):
    """A request on the books of its workers. Of those that were replaced or removed nobody reads the books."""

    __slots__ = ("decode", "end_s", "is_prefilled", "prefill", "prefills")

    def __init__(
        self, choice: Choice, request: RequestArrived | RequestPlaced, num_output_tokens: int, prefill_s: float
    ) -> None:
        is_batch = request.urgency.is_batch
        super().__init__(request.num_prompt_tokens, request.max_tokens, num_output_tokens, prefill_s, is_batch=is_batch)
        self.decode = choice.decode
        self.prefill = choice.prefill
        self.prefills = choice.prefills
        self.is_prefilled = False
        self.end_s = 0.0  # predicted with the first token


class ClusterController:
    """Knows the live workers and what was placed on them. No I/O, no clock, no randomness.

    Args:
        expected_workers: ids that were launched; those not registered are reported as missing.
        heartbeat_timeout_s: a worker not heard of for this long, and for three heartbeats, is taken for dead.
        epoch: tells this controller from the one before it, of which nothing is known here.

    Raises:
        ConfigError: there is no such placement policy.
    """

    def __init__(
        self,
        expected_workers: Sequence[str] = (),
        heartbeat_timeout_s: float = 5.0,
        options: PlacementOptions = PlacementOptions(),  # noqa: B008  frozen
        epoch: int = 0,
    ) -> None:
        self._expected = tuple(expected_workers)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._epoch = epoch
        self._costs = CostModel()
        self._policy = make_policy(options, self._costs)
        self._workers = WorkerTable(self._policy.ranking, self._policy.grouping)
        self._cache = CacheIndex()
        self._cluster = Cluster(self._workers, self._cache)
        self._pairing = PairingRules()
        self._neighbours = Neighbours()
        self._log = PredictionLog(self._costs)
        self._placed: dict[str, _Placed] = {}
        self._mean_output_tokens = OUTPUT_TOKENS_GUESS
        self._duties = DutyBook(self._workers, options.move_after_s)
        self._demand = DemandMeter()
        self._planner = RolePlanner()
        self._plans_roles = options.roles_follow_load
        self._ttft_target_s = options.ttft_target_s
        self._tpot_target_s = options.tpot_target_s
        self._plan_at_s = 0.0
        self._pools: tuple[PoolLoad, ...] = ()

    @classmethod
    def from_snapshot(
        cls, snapshot: ClusterSnapshot, placed: Iterable[RequestPlaced], options: PlacementOptions, now: float
    ) -> ClusterController:
        """Goes on from what somebody knows who is not told of everything: a gateway whose scheduler is away.

        Args:
            placed: the requests that it knows of. Others are seen in the workers' load.
        """
        controller = cls(options=options, epoch=snapshot.epoch)
        for worker in snapshot.workers:
            controller.handle(WorkerRegistered(worker.info, worker.duty), now)
        for request in placed:
            controller.handle(request, now)
        for worker in snapshot.workers:
            controller.handle(WorkerReported(worker.info.worker_id, worker.info.incarnation, worker.load), now)
        return controller

    def handle(self, event: Event, now: float) -> list[Command]:
        """Takes one event at monotonic time ``now`` (seconds) and says what follows from it."""
        match event:
            case RequestArrived():
                command = self.place(event, now)
                assert not isinstance(command, FirstToken), "no limit was given"
                return [command]
            case PrefillDone():
                self._log.first_token(event.request_id, now)
                placed = self._placed.get(event.request_id)
                if placed is not None and not placed.is_prefilled:
                    self._end_prefill(placed, now)
            case RequestEnded():
                self._log.end(event.request_id, event.num_output_tokens, now)
                self._end_request(event, now)
            case WorkerReported():
                return self._report(event, now)
            case WorkerRegistered():
                return self._register(event, now)
            case WorkerLeft():
                return self._remove(event.worker_id, event.incarnation, "it has left", now)
            case RequestPlaced():
                self._book_told(event, now)
            case Tick():
                return self._tick(event.num_queued, now)
            case _:
                return self._order(event)
        return []

    def _order(self, event: DrainWorker | ActivateWorker | ChangeRole | WorkersExpected) -> list[Command]:
        """What operators and the launcher want of the workers."""
        match event:
            case DrainWorker():
                return self._duties.drain(event.worker_id, force=event.force, move_after_s=event.move_after_s)
            case ActivateWorker():
                return self._duties.activate(event.worker_id)
            case ChangeRole():
                return self._duties.change_role(event.worker_id, event.role, event.move_after_s)
            case WorkersExpected():
                self._expected = event.worker_ids
        return []

    def _tick(self, num_queued: int, now: float) -> list[Command]:
        commands = self._remove_silent(now)
        if now >= self._plan_at_s:
            self._plan_at_s = now + PLAN_INTERVAL_S
            commands += self._plan(num_queued, now)
        return commands

    def _plan(self, num_queued: int, now: float) -> list[Command]:
        """Looks at a part of the workers at most: meanwhile no request is placed."""
        able = candidates(self._workers, self._costs, self._demand.sizes(), self._tpot_target_s)
        self._pools = pool_loads(self._workers, able, self._costs, self._demand, num_queued, now)
        if not self._plans_roles or self._duties.is_changing:
            return []
        flip = self._planner.decide(able, self._demand.demand(now), now)
        return self._duties.change_role(flip.worker_id, flip.role) if flip is not None else []

    def snapshot(self, after: str = "", limit: int | None = None) -> ClusterSnapshot:
        """The workers in the order of their ids; of a page of it, ``limit`` of those after a worker's id."""
        workers = self._workers.after(after, limit)
        snapshots = tuple(worker.snapshot(self._costs.errors(worker.worker_id)) for worker in workers)
        missing = tuple(name for name in self._expected if self._workers.get(name) is None)
        return ClusterSnapshot(snapshots, missing, self._epoch, self._pools)

    @property
    def num_places(self) -> int:
        """Sequences that the workers decode at once, those aside that take no new ones."""
        return self._workers.num_places

    def outlook(self, num_prompt_tokens: int, now: float) -> Outlook | None:
        """What one more request would meet; None where no worker takes a phase."""
        decodes = self._workers.best(Phase.DECODE)
        prefills, prefilling = self._workers.best(Phase.PREFILL), Phase.PREFILL
        in_place = not prefills and Phase.PREFILL not in self._policy.phases
        if in_place:
            prefills, prefilling = decodes, Phase.DECODE
        if not prefills or not decodes:
            return None
        able = [worker for worker in prefills if self._keeps_pace(worker, num_prompt_tokens)]
        alone = [(worker, self._prefill_s(worker, num_prompt_tokens)) for worker in able or prefills]
        backlog_s, prefill_s = min(((worker.backlog_s(now, own_s), own_s) for worker, own_s in alone), key=sum)
        roomy = [worker for worker in decodes if worker.has_room(num_prompt_tokens)]
        step_s = min((self._step_s(worker, num_prompt_tokens, in_place=in_place) for worker in roomy), default=inf)
        return Outlook(backlog_s, prefill_s, step_s, len(self._workers.taking(prefilling)))

    def least_prefill_s(self, request: RequestArrived) -> float | None:
        """Predicted to compute what is not cached of its prompt, with nobody before it; None: nobody computes any."""
        prefills = self._workers.best(Phase.PREFILL)
        if Phase.PREFILL not in self._policy.phases:
            prefills += self._workers.best(Phase.DECODE)
        if request.prefixes:
            prefills += self._cluster.holders(request, NUM_HOLDERS)
        cached = ((worker, self._cluster.cached_tokens(worker, request)) for worker in prefills)
        seconds = (
            self._costs.prefill_seconds(each.worker_id, request.num_prompt_tokens, count) for each, count in cached
        )
        return min(seconds, default=None)

    def _prefill_s(self, worker: WorkerState, num_tokens: int) -> float:
        return self._costs.prefill_seconds(worker.worker_id, num_tokens)

    def _keeps_pace(self, worker: WorkerState, num_prompt_tokens: int) -> bool:
        """Whether those that decode there may wait for a chunk of the prompt: else it is hardly placed there."""
        if worker.role is WorkerRole.PREFILL:
            return True
        chunk_tokens = min(num_prompt_tokens, worker.info.max_num_batched_tokens)
        return self._prefill_s(worker, chunk_tokens) <= self._tpot_target_s

    def _step_s(self, worker: WorkerState, num_prompt_tokens: int, *, in_place: bool) -> float:
        """With a chunk of the prompt in it, where one worker does both phases."""
        step_s = self._costs.decode_step_seconds(
            worker.worker_id, worker.batch_size + 1, worker.batch_context_tokens + num_prompt_tokens
        )
        if in_place or worker.info.role is WorkerRole.COLOCATED:
            step_s += self._prefill_s(worker, min(num_prompt_tokens, worker.info.max_num_batched_tokens))
        return step_s

    def place(
        self, request: RequestArrived, now: float, ttft_limit_s: float | None = None
    ) -> PlaceRequest | RefuseRequest | FirstToken:
        """As ``handle`` of the request; but one whose first token would take longer than the limit is not placed.

        What first tokens took beyond their parts lately does not count against the limit: it is learned from what is
        placed, and would stay as it is once everything was refused for it.
        """
        num_output_tokens = self._expected_output(request.max_tokens)
        try:
            choice = self._policy.choose(request, num_output_tokens, self._cluster, now)
        except UnavailableError as error:
            return RefuseRequest(request.request_id, error.message)
        prefills = choice.prefills
        num_cached_tokens = choice.num_cached_tokens
        if num_cached_tokens is None:
            num_cached_tokens = self._cluster.cached_tokens(prefills, request)
        prefill_s = choice.prefill_s
        if prefill_s is None or prefills.info.node:  # those that compute now count, and not as many as mostly
            beside = self._neighbours.beside(prefills)
            prefill_s = self._costs.prefill_seconds(
                prefills.worker_id, request.num_prompt_tokens, num_cached_tokens, beside
            )
        if ttft_limit_s is not None:
            first = self._first_token(choice, request, prefill_s, now)
            if first.ttft_s > ttft_limit_s:
                return first
        self._demand.add(request.num_prompt_tokens, num_cached_tokens, num_output_tokens, now)
        prefill = choice.prefill.address if choice.prefill is not None else None
        placement = Placement(request.request_id, choice.decode.address, prefill)
        if self._log.wants(now):
            num_held_tokens = self._cluster.cached_tokens(choice.decode, request)
            sizes = Sizes(request.num_prompt_tokens, num_output_tokens, num_cached_tokens, num_held_tokens)
            prediction = predict(self._costs, placement, sizes, prefill_s, prefills, choice.decode, now)
            self._log.begin(placement, prediction, now)
        self._book(request.request_id, _Placed(choice, request, num_output_tokens, prefill_s), now)
        return PlaceRequest(placement)

    def refused(self, request: RequestArrived, now: float) -> None:
        """Hears of an interactive request that was not placed for want of workers: it is asked for all the same."""
        self._demand.refuse(request.num_prompt_tokens, self._expected_output(request.max_tokens), now)

    def _first_token(self, choice: Choice, request: RequestArrived, prefill_s: float, now: float) -> FirstToken:
        handoff_s = 0.0
        if choice.prefill is not None:
            num_tokens = request.num_prompt_tokens - self._cluster.cached_tokens(choice.decode, request)
            handoff_s = self._costs.transfer_seconds(choice.prefill.worker_id, choice.decode.worker_id, num_tokens)
        return FirstToken(choice.prefills.backlog_s(now, prefill_s), prefill_s + handoff_s)

    def _expected_output(self, max_tokens: int) -> int:
        return min(max_tokens, max(1, round(self._mean_output_tokens)))

    def _book(self, request_id: str, placed: _Placed, now: float) -> None:
        self._placed[request_id] = placed
        decode, prefill = placed.decode, placed.prefill
        if not placed.is_prefilled:
            placed.prefills.begin_prefill(placed, now)
        decode.begin_decode(placed, now)
        decode.begin_request(placed.num_prompt_tokens + placed.max_tokens)
        if placed.is_prefilled:
            self._begin_decoding(placed, now)
        if prefill is not None:
            if not placed.is_prefilled:
                prefill.begin_request(placed.num_prompt_tokens)
            self._changed(prefill, now)
        self._changed(decode, now)

    def _changed(self, worker: WorkerState, now: float) -> None:
        """After any change of a worker's books."""
        self._workers.changed(worker)
        if worker.info.node:
            self._neighbours.changed(worker, now)

    def _book_told(self, event: RequestPlaced, now: float) -> None:
        """Of a worker that is not here the requests are not booked, and end with it."""
        placement = event.placement
        decode = self._workers.get(placement.decode.worker_id)
        prefill = self._workers.get(placement.prefill.worker_id) if placement.prefill is not None else None
        if decode is None or (placement.prefill is not None and prefill is None and not event.is_prefilled):
            return
        choice = Choice(decode, prefill)
        num_output_tokens = self._expected_output(event.max_tokens)
        prefill_s = self._costs.prefill_seconds(choice.prefills.info.worker_id, event.num_prompt_tokens, 0)
        placed = _Placed(choice, event, num_output_tokens, prefill_s)
        placed.is_prefilled = event.is_prefilled
        self._unbook(placement.request_id, now)
        self._book(placement.request_id, placed, now)

    def _end_prefill(self, placed: _Placed, now: float) -> None:
        placed.is_prefilled = True
        prefill = placed.prefills
        prefill.end_prefill(placed, now)
        self._begin_decoding(placed, now)
        if placed.prefill is not None:
            prefill.end_request(placed.num_prompt_tokens)
            if placed.decode.info.node:
                self._neighbours.changed(placed.decode, now)
        self._changed(prefill, now)

    def _begin_decoding(self, placed: _Placed, now: float) -> None:
        decode = placed.decode
        if self._workers.get(decode.worker_id) is not decode:
            return
        step_s = decode.step_s  # kept by a policy
        if not step_s:
            context_tokens = decode.decoding_context_tokens + placed.context_tokens
            step_s = self._costs.decode_step_seconds(decode.worker_id, decode.decoding_size + 1, context_tokens)
        placed.end_s = now + (placed.num_output_tokens - 1) * step_s
        decode.first_token(placed, placed.end_s)

    def _end_request(self, event: RequestEnded, now: float) -> None:
        self._unbook(event.request_id, now)
        if event.num_output_tokens:
            self._mean_output_tokens += _OUTPUT_MEMORY * (event.num_output_tokens - self._mean_output_tokens)

    def _unbook(self, request_id: str, now: float) -> None:
        placed = self._placed.pop(request_id, None)
        if placed is None:
            return
        if not placed.is_prefilled:
            self._end_prefill(placed, now)
        decode = placed.decode
        decode.end_decode(placed, placed.end_s)
        decode.end_request(placed.num_prompt_tokens + placed.max_tokens)
        self._changed(decode, now)

    def _register(self, event: WorkerRegistered, now: float) -> list[Command]:
        info = event.info
        problem = self._pairing.problem(info)
        if problem is not None:
            return [RefuseWorker(info.worker_id, problem, is_final=True)]
        known = self._workers.get(info.worker_id)
        if known is not None and known.info.incarnation > info.incarnation:
            return [RefuseWorker(info.worker_id, f"a newer process of {info.worker_id} is registered", is_final=False)]
        if known is not None and known.info == info:
            self._hear(known, known.load, now)
            return []
        if known is not None:
            self._forget(known, now)
        self._enter(event, now)
        return []

    def _enter(self, event: WorkerRegistered, now: float) -> None:
        info = event.info
        self._costs.add(info)
        self._pairing.add(info)
        self._duties.enter(info.worker_id)
        longest_s = self._costs.prefill_seconds(info.worker_id, info.max_num_batched_tokens)
        rest_s = min(longest_s, self._ttft_target_s / STEPS_PER_FIRST_TOKEN) / 2
        worker = WorkerState(info, WorkerLoad(blocks_free=info.num_blocks), now, event.duty, rest_s)
        self._workers.add(worker)
        self._neighbours.add(worker, now)

    def _hear(self, worker: WorkerState, load: WorkerLoad, now: float) -> None:
        worker.hear(load, now)
        self._workers.heard(worker)
        self._changed(worker, now)

    def _report(self, event: WorkerReported, now: float) -> list[Command]:
        worker = self._workers.get(event.worker_id)
        if worker is None or worker.info.incarnation < event.incarnation:
            return [AskToRegister(event.worker_id)]
        if worker.info.incarnation > event.incarnation:
            return []
        if event.steps:
            self._observe(worker, event.steps, now)
        for transfers in event.transfers:
            self._costs.observe_transfers(event.worker_id, transfers)
        self._hear(worker, event.load, now)  # after what it tells was learned: its rank is predicted anew
        if event.cache is not None and not self._cache.apply(event.worker_id, event.cache):
            return [AskForCache(event.worker_id), *self._pace(worker), *self._duties.heard(worker)]
        return [*self._pace(worker), *self._duties.heard(worker)]

    def _observe(self, worker: WorkerState, steps: Iterable[StepTimes], now: float) -> None:
        neighbours = self._neighbours.take(worker, now)
        for each in steps:
            self._costs.observe(worker.worker_id, each, neighbours)
        self._workers.learned(worker)

    def _pace(self, worker: WorkerState) -> list[Command]:
        """The more workers there are the rarer each reports, for every heartbeat is a call."""
        wanted_s = min(MAX_HEARTBEAT_INTERVAL_S, max(HEARTBEAT_INTERVAL_S, len(self._workers) / HEARTBEATS_PER_S))
        if abs(wanted_s - worker.heartbeat_s) <= _PACE_SLACK * worker.heartbeat_s:
            return []
        worker.heartbeat_s = wanted_s
        return [BeatEvery(worker.worker_id, wanted_s)]

    def _remove_silent(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for worker in self._workers.silent_since(now - self._heartbeat_timeout_s):
            timeout_s = max(self._heartbeat_timeout_s, _MISSED_HEARTBEATS * worker.heartbeat_s)
            if worker.last_heard_s < now - timeout_s:
                reason = f"no heartbeat for {timeout_s:g} s"
                commands += self._remove(worker.worker_id, worker.info.incarnation, reason, now)
        return commands

    def _remove(self, worker_id: str, incarnation: int, message: str, now: float) -> list[Command]:
        worker = self._workers.get(worker_id)
        if worker is None or worker.info.incarnation != incarnation:
            return []
        self._forget(worker, now)
        return [WorkerRemoved(worker_id, message)]

    def _forget(self, worker: WorkerState, now: float) -> None:
        self._workers.remove(worker)
        self._neighbours.remove(worker, now)
        self._cache.forget(worker.worker_id)
        self._costs.remove(worker.worker_id)
        self._pairing.remove(worker.info)
