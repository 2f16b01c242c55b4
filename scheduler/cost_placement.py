"""Our placement: the lowest predicted cost that keeps the latency targets, or else the earliest finish.

docs/placement.md explains it with numbers. Everything is predicted by the cost model, from the books.

A request's cost is what its placement makes requests spend on devices, in seconds times the price of each: its own
wait and computation on the prefill worker, its own decoding, and what it adds to those that decode beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log

from scheduler.events import RequestArrived
from scheduler.placement import NUM_HOLDERS, Choice, Cluster, can_hand_over, prefills_in_place
from scheduler.types import Phase, WorkerRole
from scheduler.worker_state import CostPredictor, WorkerState
from scheduler.worker_table import Rank

TYPICAL_OUTPUT_TOKENS = 128  # to weigh decoding against waiting prompts where no request is in question yet
_LIKE = log(1.1)  # devices whose rates differ by less are of one kind: measured rates differ a little everywhere


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One worker that could compute the prompt for others."""

    worker: WorkerState
    ready_s: float  # from now until the first token is sampled there
    cost: float
    price: float
    keeps_pace: bool  # sequences that decode beside it keep their TPOT target


@dataclass(frozen=True, slots=True)
class _Decode:
    """One worker that could decode, with what it would take to prefill there too."""

    worker: WorkerState
    wait_s: float  # for room in the batch
    decode_s: float  # all tokens after the first
    cost: float
    price: float
    num_missing_tokens: int  # of the prompt, that a handoff would have to bring
    keeps_pace: bool
    in_place: _Prefill


@dataclass(slots=True)
class _Search:
    """Keeps the better of two."""

    value: float = inf
    choice: Choice | None = None

    def offer(self, value: float, decode: WorkerState, prefill: WorkerState | None) -> None:
        if value < self.value:
            self.value = value
            self.choice = Choice(decode, prefill)


class CostPlacement:
    """Looks at the least loaded worker of each kind and at those with most of the prompt cached, for each phase.

    Of their pairs it finds the best: the lowest cost among those that keep both targets; else the earliest finish
    among those that let nobody decode too slowly; else the earliest finish.
    """

    def __init__(self, costs: CostPredictor, ttft_target_s: float, tpot_target_s: float) -> None:
        self._costs = costs
        self._ttft_target_s = ttft_target_s
        self._tpot_target_s = tpot_target_s

    def ranking(self, phase: Phase, worker: WorkerState) -> Rank:
        """By when a prompt would be begun; by how long a typical answer would take, behind prompts in place."""
        if phase is Phase.PREFILL and worker.info.role is WorkerRole.PREFILL:
            return (worker.free_at_s, worker.requests_placed, worker.info.worker_id)
        step_s = self._costs.decode_step_seconds(
            worker.info.worker_id, worker.batch_size + 1, worker.batch_context_tokens
        )
        return (worker.prefill_s + step_s * TYPICAL_OUTPUT_TOKENS, worker.requests_placed, worker.info.worker_id)

    def grouping(self, worker: WorkerState) -> object:
        """Workers that are predicted to take about as long as each other, at the same price."""
        info = worker.info
        device = info.device
        rates = (device.gemm_gflop_s, device.read_gb_s)
        likeness = tuple(round(log(rate) / _LIKE) for rate in rates)
        return (info.role, info.spec, info.max_num_seqs, device.price_per_hour, likeness)

    def choose(self, request: RequestArrived, num_output_tokens: int, cluster: Cluster, now: float) -> Choice:
        holders = cluster.holders(request, NUM_HOLDERS) if request.prefixes else []
        decodes = [
            self._decode(worker, request, num_output_tokens, cluster, now)
            for worker in _candidates(Phase.DECODE, request, cluster, holders)
        ]
        prefills: list[_Prefill] = []
        if any(not prefills_in_place(decode.worker) for decode in decodes) and cluster.workers.taking(Phase.PREFILL):
            prefills = [
                self._prefill(worker, request.num_prompt_tokens, cluster.cached_tokens(worker, request), cluster, now)
                for worker in _candidates(Phase.PREFILL, request, cluster, holders)
            ]
        choice = self._cheapest(prefills, decodes)
        if choice is None:
            choice = self._earliest(prefills, decodes, keeping_pace=True)
        if choice is None:
            choice = self._earliest(prefills, decodes, keeping_pace=False)
        assert choice is not None, "there is always prefill in place"
        return choice

    def _prefill(
        self, worker: WorkerState, num_prompt_tokens: int, num_cached_tokens: int, cluster: Cluster, now: float
    ) -> _Prefill:
        """What it takes to compute the prompt there. Those that decode there stand still meanwhile, chunk by chunk."""
        info = worker.info
        own_s = self._costs.prefill_seconds(info.worker_id, num_prompt_tokens, num_cached_tokens)
        ready_s = worker.backlog_s(now) + own_s
        price = info.device.price_per_hour if cluster.workers.all_priced else 1.0
        if info.role is WorkerRole.PREFILL:
            return _Prefill(worker, ready_s, price * ready_s, price, keeps_pace=True)
        batch_size, context_tokens = worker.batch_size, worker.batch_context_tokens
        chunk = min(num_prompt_tokens - num_cached_tokens, info.max_num_batched_tokens)
        pause_s = self._costs.prefill_seconds(info.worker_id, chunk)
        if batch_size:
            pause_s += self._costs.decode_step_seconds(info.worker_id, batch_size, context_tokens)
        cost = price * (ready_s + own_s * batch_size)
        return _Prefill(worker, ready_s, cost, price, keeps_pace=pause_s <= self._tpot_target_s)

    def _decode(
        self, worker: WorkerState, request: RequestArrived, num_output_tokens: int, cluster: Cluster, now: float
    ) -> _Decode:
        info, costs = worker.info, self._costs
        batch_size, context_tokens = worker.batch_size, worker.batch_context_tokens
        own_tokens = request.num_prompt_tokens + num_output_tokens // 2
        step_s = costs.decode_step_seconds(info.worker_id, batch_size + 1, context_tokens + own_tokens)
        decode_s = step_s * (num_output_tokens - 1)
        added_s = 0.0  # to each of the others
        if batch_size:
            now_s = costs.decode_step_seconds(info.worker_id, batch_size, context_tokens)
            added_s = (step_s - now_s) * (num_output_tokens - 1)
        wait_s = decode_s * _crowding(worker, own_tokens)
        num_cached_tokens = cluster.cached_tokens(worker, request)
        in_place = self._prefill(worker, request.num_prompt_tokens, num_cached_tokens, cluster, now)
        price = in_place.price
        return _Decode(
            worker,
            wait_s,
            decode_s,
            price * (wait_s + decode_s + added_s * batch_size),
            price,
            request.num_prompt_tokens - num_cached_tokens,
            step_s <= self._tpot_target_s,
            in_place,
        )

    def _cheapest(self, prefills: Sequence[_Prefill], decodes: Sequence[_Decode]) -> Choice | None:
        """The lowest cost of what keeps both targets, if anything does."""
        search, target_s = _Search(), self._ttft_target_s
        able = sorted(
            (prefill for prefill in prefills if prefill.keeps_pace and prefill.ready_s <= target_s), key=_cost_of
        )
        for decode in decodes:
            if not decode.keeps_pace or decode.wait_s > target_s:
                continue
            if decode.in_place.keeps_pace and decode.wait_s + decode.in_place.ready_s <= target_s:
                search.offer(decode.cost + decode.in_place.cost, decode.worker, None)
            for prefill in able:
                if decode.cost + prefill.cost >= search.value:
                    break  # those that follow cost no less
                if can_hand_over(prefill.worker, decode.worker) and not prefills_in_place(decode.worker):
                    transfer_s = self._transfer_s(prefill, decode)
                    if decode.wait_s + prefill.ready_s + transfer_s <= target_s:
                        cost = decode.cost + prefill.cost + prefill.price * transfer_s
                        search.offer(cost, decode.worker, prefill.worker)
        return search.choice

    def _earliest(
        self, prefills: Sequence[_Prefill], decodes: Sequence[_Decode], *, keeping_pace: bool
    ) -> Choice | None:
        """The earliest finish, if anything keeps the pace that may have to be kept.

        A prompt in place counts what it delays others by as if it were its own.
        """
        search = _Search()
        able = sorted((prefill for prefill in prefills if prefill.keeps_pace or not keeping_pace), key=_ready_of)
        for decode in decodes:
            if keeping_pace and not decode.keeps_pace:
                continue
            rest_s = decode.wait_s + decode.decode_s
            if decode.in_place.keeps_pace or not keeping_pace:
                search.offer(rest_s + decode.in_place.cost / decode.price, decode.worker, None)
            for prefill in able:
                if rest_s + prefill.ready_s >= search.value:
                    break
                if can_hand_over(prefill.worker, decode.worker) and not prefills_in_place(decode.worker):
                    finish_s = rest_s + prefill.cost / prefill.price + self._transfer_s(prefill, decode)
                    search.offer(finish_s, decode.worker, prefill.worker)
        return search.choice

    def _transfer_s(self, prefill: _Prefill, decode: _Decode) -> float:
        return self._costs.transfer_seconds(
            prefill.worker.info.worker_id, decode.worker.info.worker_id, decode.num_missing_tokens
        )


def _candidates(
    phase: Phase, request: RequestArrived, cluster: Cluster, holders: Sequence[WorkerState]
) -> list[WorkerState]:
    best = cluster.best(phase, request.avoid)
    return [*best, *(worker for worker in holders if worker.takes(phase) and worker not in best)]


def _crowding(worker: WorkerState, own_tokens: int) -> float:
    """By how much the sequences there, and this one, exceed what fits at once, as a part of that."""
    info = worker.info
    places = (worker.batch_size + 1) / info.max_num_seqs
    tokens = (worker.batch_context_tokens + own_tokens) / (info.num_blocks * info.spec.block_size)
    return max(0.0, places - 1, tokens - 1)


def _cost_of(prefill: _Prefill) -> float:
    return prefill.cost


def _ready_of(prefill: _Prefill) -> float:
    return prefill.ready_s
