"""Our placement: the lowest predicted cost that keeps the latency targets, or else the earliest finish.

docs/placement.md explains it with numbers. Everything is predicted by the cost model, from the books.

A request's cost is what its placement makes requests spend on devices, in seconds times the price of each: its own
wait and computation on the prefill worker, its own decoding, and what it adds to those that decode beside it.
"""

from __future__ import annotations

from math import inf, log
from operator import attrgetter
from typing import NamedTuple

from scheduler.cost_model import CostModel
from scheduler.events import RequestArrived
from scheduler.placement import NUM_HOLDERS, Choice, Cluster, can_hand_over, prefills_in_place
from scheduler.types import Phase, WorkerRole
from scheduler.worker_state import WorkerState
from scheduler.worker_table import Rank

TYPICAL_OUTPUT_TOKENS = 128  # to weigh decoding against waiting prompts where no request is in question yet
_PREFILL, _DECODE = WorkerRole.PREFILL, WorkerRole.DECODE  # members of an enumeration are slow to get
_DECODING, _PREFILLING = Phase.DECODE, Phase.PREFILL
_cost, _delay_s = attrgetter("cost"), attrgetter("delay_s")
_new = tuple.__new__  # what named tuples have of their own takes four times as long
_LIKE = log(1.1)  # devices whose rates differ by less are of one kind: measured rates differ a little everywhere


class _Asked:
    """What is the same for all workers that are looked at for one request."""

    __slots__ = ("cache", "context_tokens", "in_money", "is_batch", "now", "num_prompt_tokens", "num_steps", "prefixes")

    def __init__(self, request: RequestArrived, num_output_tokens: int, cluster: Cluster, now: float) -> None:
        self.num_prompt_tokens = request.num_prompt_tokens
        self.num_steps = num_output_tokens - 1
        self.context_tokens = request.num_prompt_tokens + num_output_tokens // 2
        self.in_money = cluster.workers.all_priced
        self.is_batch = request.urgency.is_batch
        self.now = now
        self.cache = cluster.cache
        self.prefixes = request.prefixes


class _Prefill(NamedTuple):
    """A worker that could compute the prompt."""

    cost: float  # without the handoff
    delay_s: float  # until the first token is sampled there, and what those that decode there wait for it, all together
    ready_s: float  # from now until the first token is sampled there
    own_s: float  # to compute it
    num_cached_tokens: int
    price: float
    keeps_pace: bool  # those that decode there keep their TPOT target
    worker: WorkerState


class _Decode(NamedTuple):
    """A worker that could decode."""

    cost: float  # of the rest, and of how much those that decode there are delayed
    wait_s: float  # for room in the batch
    rest_s: float  # that, and all tokens after the first
    price: float
    keeps_pace: bool
    worker: WorkerState


_Found = tuple[WorkerState, _Prefill] | None  # decode worker and, maybe on the same one, prefill


class CostPlacement:
    """Looks at the least loaded worker of each kind and at those with most of the prompt cached, for each phase.

    Of their pairs it finds the best: the lowest cost among those that keep both targets; else the earliest finish
    among those that let nobody decode too slowly; else the earliest finish.
    """

    phases = (Phase.DECODE,)  # where no worker prefills, those that decode do

    def __init__(self, costs: CostModel, ttft_target_s: float, tpot_target_s: float) -> None:
        self._costs = costs.workers
        self._ttft_target_s = ttft_target_s
        self._tpot_target_s = tpot_target_s

    def ranking(self, phase: Phase, worker: WorkerState) -> Rank:
        """By when a prompt would be begun; by what a typical answer would cost in time, behind prompts in place.

        The steps that the latter follows from are kept until the worker's books change.
        """
        if worker.role is _PREFILL:
            return (worker.free_at_s, worker.requests_placed, worker.worker_id)
        batch_size, context_tokens = worker.batch_size, worker.batch_context_tokens
        step_s, joined_step_s = self._costs[worker.worker_id].two_steps_seconds(batch_size, context_tokens)
        worker.step_s = step_s if batch_size else joined_step_s
        worker.joined_step_s = joined_step_s
        token_s = joined_step_s + (joined_step_s - worker.step_s) * batch_size
        if batch_size >= worker.info.max_num_seqs or context_tokens > worker.max_tokens:
            token_s += joined_step_s * _excess(worker, batch_size, context_tokens)
        typical_s = worker.prefill_s + token_s * TYPICAL_OUTPUT_TOKENS
        return (typical_s, worker.requests_placed, worker.worker_id)

    def grouping(self, worker: WorkerState) -> object:
        """Workers that are predicted to take about as long as each other, at the same price.

        By their devices, and by how far what was learned of them is from that.
        """
        info = worker.info
        device = info.device
        likeness = tuple(round(log(rate) / _LIKE) for rate in (device.gemm_gflop_s, device.read_gb_s))
        drift = self._costs[worker.worker_id].drift
        return (info.role, info.spec, info.max_num_seqs, device.price_per_hour, likeness, drift)

    def choose(self, request: RequestArrived, num_output_tokens: int, cluster: Cluster, now: float) -> Choice:
        asked = _Asked(request, num_output_tokens, cluster, now)
        holders = cluster.holders(request, NUM_HOLDERS)
        bound = cluster.bound_to(request) if request.stay_on else None
        decoding = [bound] if bound is not None else cluster.best(_DECODING, request.avoid)
        prefilling = cluster.workers.best(_PREFILLING, request.avoid)
        for holder in holders:
            if holder.role is not _PREFILL and bound is None and holder not in decoding:
                decoding.append(holder)
            if holder.role is not _DECODE and holder not in prefilling:
                prefilling.append(holder)
        decodes = [self._decode(worker, asked) for worker in decoding]
        prefills = [self._prefill(worker, _cached_tokens(worker, asked), asked) for worker in prefilling]
        best = (
            self._cheapest(asked, decodes, prefills)
            or self._earliest(asked, decodes, prefills, keeping_pace=True)
            or self._earliest(asked, decodes, prefills, keeping_pace=False)
        )
        assert best is not None, "prefill in place is always possible"
        decode, prefill = best
        elsewhere = prefill.worker if prefill.worker is not decode else None
        return Choice(decode, elsewhere, prefill.num_cached_tokens, prefill.own_s)

    def _prefill(self, worker: WorkerState, num_cached_tokens: int, asked: _Asked) -> _Prefill:
        """Those that decode there stand still meanwhile, chunk by chunk; and somebody may join them at any moment."""
        info, num_tokens = worker.info, asked.num_prompt_tokens
        costs = self._costs[worker.worker_id]
        ready_s = own_s = costs.prefill_seconds(num_tokens, num_cached_tokens)
        if worker.free_at_s > asked.now:
            ready_s += worker.backlog_s(asked.now, own_s)
        price = worker.price_per_hour if asked.in_money else 1.0
        if worker.role is _PREFILL:
            cost = price * ready_s
            return _new(_Prefill, (cost, ready_s, ready_s, own_s, num_cached_tokens, price, True, worker))
        pause_s = own_s
        if num_tokens - num_cached_tokens > info.max_num_batched_tokens:
            pause_s = costs.prefill_seconds(info.max_num_batched_tokens, 0)
        batch_size = worker.batch_size
        if batch_size:
            pause_s += worker.step_s
        keeps_pace = pause_s <= self._tpot_target_s
        delay_s = ready_s + own_s * batch_size
        return _Prefill(price * delay_s, delay_s, ready_s, own_s, num_cached_tokens, price, keeps_pace, worker)

    def _decode(self, worker: WorkerState, asked: _Asked) -> _Decode:
        batch_size, num_steps = worker.batch_size, asked.num_steps
        context_tokens = worker.batch_context_tokens + asked.context_tokens
        step_s = worker.joined_step_s + self._costs[worker.worker_id].context_token_s * asked.context_tokens
        rest_s = step_s * num_steps
        wait_s = 0.0
        if batch_size >= worker.info.max_num_seqs or context_tokens > worker.max_tokens:
            if asked.is_batch:
                wait_s = rest_s * _excess(worker, batch_size, context_tokens)
            else:  # the worker preempts batch work for it
                in_way, in_way_tokens = batch_size - worker.num_batch, context_tokens - worker.batch_tokens
                wait_s = rest_s * _excess(worker, in_way, in_way_tokens)
            rest_s += wait_s
        delay_s = rest_s + (step_s - worker.step_s) * num_steps * batch_size
        price = worker.price_per_hour if asked.in_money else 1.0
        keeps_pace = step_s <= self._tpot_target_s
        return _new(_Decode, (price * delay_s, wait_s, rest_s, price, keeps_pace, worker))

    def _cheapest(self, asked: _Asked, decodes: list[_Decode], prefills: list[_Prefill]) -> _Found:
        """The lowest cost of what keeps both targets, if anything does."""
        best: _Found = None
        best_cost = inf
        able = sorted(prefills, key=_cost)
        decodes.sort(key=_cost)
        for decode_cost, wait_s, _, price, keeps_pace, decode in decodes:
            if decode_cost >= best_cost:
                break  # those that follow cost no less; so below
            slack_s = self._ttft_target_s - wait_s
            if not keeps_pace or slack_s < 0:
                continue
            num_cached_tokens = -1  # not looked up yet
            for prefill in able:
                cost = decode_cost + prefill.cost
                if cost >= best_cost:
                    break
                if prefill.ready_s > slack_s or not prefill.keeps_pace or not _fits(prefill.worker, decode):
                    continue
                if num_cached_tokens < 0:
                    num_cached_tokens = _cached_tokens(decode, asked)
                transfer_s = self._transfer_s(prefill.worker, decode, asked.num_prompt_tokens - num_cached_tokens)
                cost += prefill.price * transfer_s
                if prefill.ready_s + transfer_s <= slack_s and cost < best_cost:
                    best, best_cost = (decode, prefill), cost
            least_s = self._costs[decode.worker_id].least_prefill_s
            if decode_cost + price * least_s * (1 + decode.batch_size) < best_cost:
                if num_cached_tokens < 0:
                    num_cached_tokens = _cached_tokens(decode, asked)
                own = self._prefill(decode, num_cached_tokens, asked)
                cost = decode_cost + own.cost
                if own.keeps_pace and own.ready_s <= slack_s and cost < best_cost:
                    best, best_cost = (decode, own), cost
        return best

    def _earliest(
        self, asked: _Asked, decodes: list[_Decode], prefills: list[_Prefill], *, keeping_pace: bool
    ) -> _Found:
        """The earliest finish, of what keeps the pace where it must. Delays of others by a prompt count as its own."""
        best: _Found = None
        best_s = inf
        able = [each for each in prefills if each.keeps_pace or not keeping_pace]
        able.sort(key=_delay_s)
        for _, _, rest_s, _, keeps_pace, decode in decodes:
            if keeping_pace and not keeps_pace:
                continue
            num_cached_tokens = _cached_tokens(decode, asked)
            own = self._prefill(decode, num_cached_tokens, asked)
            finish_s = rest_s + own.delay_s
            if (own.keeps_pace or not keeping_pace) and finish_s < best_s:
                best, best_s = (decode, own), finish_s
            for prefill in able:
                finish_s = rest_s + prefill.delay_s
                if finish_s >= best_s:
                    break
                if _fits(prefill.worker, decode):
                    num_sent_tokens = asked.num_prompt_tokens - num_cached_tokens
                    finish_s += self._transfer_s(prefill.worker, decode, num_sent_tokens)
                    if finish_s < best_s:
                        best, best_s = (decode, prefill), finish_s
        return best

    def _transfer_s(self, prefill: WorkerState, decode: WorkerState, num_tokens: int) -> float:
        costs = self._costs
        return costs[prefill.worker_id].transfer_seconds(costs[decode.worker_id], num_tokens)


def _excess(worker: WorkerState, num_others: int, context_tokens: int) -> float:
    """How much of an answer's time one more sequence waits: what does not fit, until as much has ended."""
    return max(1.0, (num_others + 1) / worker.info.max_num_seqs, context_tokens / worker.max_tokens) - 1


def _cached_tokens(worker: WorkerState, asked: _Asked) -> int:
    return asked.cache.cached_tokens(worker.info, asked.prefixes, asked.num_prompt_tokens)


def _fits(prefill: WorkerState, decode: WorkerState) -> bool:
    if prefill.role is _PREFILL and decode.role is _DECODE:
        return True  # as it mostly is
    return not prefills_in_place(decode) and can_hand_over(prefill, decode)
