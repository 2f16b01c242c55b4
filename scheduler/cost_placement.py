"""Our placement: the lowest predicted cost that keeps the latency targets, or else the earliest finish.

docs/placement.md explains it with numbers. Everything is predicted by the cost model, from the books.

A request's cost is what its placement makes requests spend on devices, in seconds times the price of each: its own
wait and computation on the prefill worker, its own decoding, and what it adds to those that decode beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from operator import attrgetter, itemgetter

from scheduler.events import RequestArrived
from scheduler.placement import NUM_HOLDERS, Choice, Cluster, can_hand_over, prefills_in_place
from scheduler.types import Phase, WorkerRole
from scheduler.worker_state import CostPredictor, WorkerState
from scheduler.worker_table import Rank

TYPICAL_OUTPUT_TOKENS = 128  # to weigh decoding against waiting prompts where no request is in question yet
_PREFILL, _DECODE = WorkerRole.PREFILL, WorkerRole.DECODE  # members of an enumeration are slow to get
_first = itemgetter(0)
_cost = attrgetter("cost")
_LIKE = log(1.1)  # devices whose rates differ by less are of one kind: measured rates differ a little everywhere


class _Asked:
    """What is the same for all workers that are looked at for one request."""

    __slots__ = ("cache", "context_tokens", "in_money", "now", "num_prompt_tokens", "num_steps", "prefixes")

    def __init__(self, request: RequestArrived, num_output_tokens: int, cluster: Cluster, now: float) -> None:
        self.num_prompt_tokens = request.num_prompt_tokens
        self.num_steps = num_output_tokens - 1
        self.context_tokens = request.num_prompt_tokens + num_output_tokens // 2
        self.in_money = cluster.workers.all_priced
        self.now = now
        self.cache = cluster.cache
        self.prefixes = request.prefixes


@dataclass(slots=True)  # not frozen: there are a dozen for every request
class _Prefill:
    """A worker that could compute the prompt."""

    worker: WorkerState
    num_cached_tokens: int
    ready_s: float  # from now until the first token is sampled there
    delay_s: float  # that, and by how much those that decode there are delayed, all together
    price: float
    keeps_pace: bool  # those that decode there keep their TPOT target


@dataclass(slots=True)
class _Decode:
    """A worker that could decode."""

    worker: WorkerState
    wait_s: float  # for room in the batch
    rest_s: float  # that, and all tokens after the first
    cost: float  # of that, and of how much those that decode there are delayed
    price: float
    keeps_pace: bool
    num_cached_tokens: int = -1  # not looked up yet


@dataclass(slots=True)
class _Best:
    """The better of what was offered."""

    value: float = inf
    decode: WorkerState | None = None
    prefill: _Prefill | None = None  # on the same worker: in place

    def offer(self, value: float, decode: WorkerState, prefill: _Prefill) -> None:
        if value < self.value:
            self.value, self.decode, self.prefill = value, decode, prefill


class CostPlacement:
    """Looks at the least loaded worker of each kind and at those with most of the prompt cached, for each phase.

    Of their pairs it finds the best: the lowest cost among those that keep both targets; else the earliest finish
    among those that let nobody decode too slowly; else the earliest finish.
    """

    phases = (Phase.DECODE,)  # where no worker prefills, those that decode do

    def __init__(self, costs: CostPredictor, ttft_target_s: float, tpot_target_s: float) -> None:
        self._costs = costs
        self._ttft_target_s = ttft_target_s
        self._tpot_target_s = tpot_target_s

    def ranking(self, phase: Phase, worker: WorkerState) -> Rank:
        """By when a prompt would be begun; by how long a typical answer would take, behind prompts in place."""
        if worker.role is _PREFILL:
            return (worker.free_at_s, worker.requests_placed, worker.worker_id)
        self._predict(worker)
        typical_s = worker.prefill_s + worker.step_s * TYPICAL_OUTPUT_TOKENS
        return (typical_s, worker.requests_placed, worker.worker_id)

    def _predict(self, worker: WorkerState) -> None:
        """What every request will ask of it, until its books change."""
        worker_id, batch_size = worker.worker_id, worker.batch_size
        if worker.predicted_at_s != worker.last_heard_s:  # what steps took is learned with heartbeats
            worker.predicted_at_s = worker.last_heard_s
            worker.context_token_s = self._costs.context_token_seconds(worker_id)
            worker.least_prefill_s = self._costs.prefill_seconds(worker_id, 1, 0)
        context_tokens = worker.batch_context_tokens
        worker.joined_step_s = self._costs.decode_step_seconds(worker_id, batch_size + 1, context_tokens)
        worker.step_s = (
            self._costs.decode_step_seconds(worker_id, batch_size, context_tokens)
            if batch_size
            else worker.joined_step_s
        )

    def grouping(self, worker: WorkerState) -> object:
        """Workers that are predicted to take about as long as each other, at the same price."""
        info = worker.info
        device = info.device
        likeness = tuple(round(log(rate) / _LIKE) for rate in (device.gemm_gflop_s, device.read_gb_s))
        return (info.role, info.spec, info.max_num_seqs, device.price_per_hour, likeness)

    def choose(self, request: RequestArrived, num_output_tokens: int, cluster: Cluster, now: float) -> Choice:
        asked = _Asked(request, num_output_tokens, cluster, now)
        holders = cluster.holders(request, NUM_HOLDERS)
        bound = cluster.bound_to(request)
        candidates = [bound] if bound is not None else cluster.best(Phase.DECODE, request.avoid)
        if bound is None:
            candidates += [each for each in holders if each.role is not _PREFILL and each not in candidates]
        decodes = [self._decode(worker, asked) for worker in candidates]
        candidates = cluster.workers.best(Phase.PREFILL, request.avoid)
        candidates += [each for each in holders if each.role is not _DECODE and each not in candidates]
        prefills = [self._prefill(worker, asked) for worker in candidates]
        best = self._cheapest(asked, decodes, prefills)
        if best.decode is None:
            best = self._earliest(asked, decodes, prefills, keeping_pace=True)
        if best.decode is None:
            best = self._earliest(asked, decodes, prefills, keeping_pace=False)
        decode, prefill = best.decode, best.prefill
        assert decode is not None and prefill is not None, "prefill in place is always possible"
        return Choice(decode, prefill.worker if prefill.worker is not decode else None, prefill.num_cached_tokens)

    def _prefill(self, worker: WorkerState, asked: _Asked) -> _Prefill:
        """Those that decode there stand still meanwhile, chunk by chunk; and somebody may join them at any moment."""
        info, num_tokens = worker.info, asked.num_prompt_tokens
        num_cached_tokens = asked.cache.cached_tokens(info, asked.prefixes, num_tokens)
        ready_s = own_s = self._costs.prefill_seconds(worker.worker_id, num_tokens, num_cached_tokens)
        if worker.free_at_s > asked.now:
            ready_s += worker.backlog_s(asked.now, own_s)
        price = info.device.price_per_hour if asked.in_money else 1.0
        if worker.role is _PREFILL:
            return _Prefill(worker, num_cached_tokens, ready_s, ready_s, price, True)
        pause_s = own_s
        if asked.num_prompt_tokens - num_cached_tokens > info.max_num_batched_tokens:
            pause_s = self._costs.prefill_seconds(info.worker_id, info.max_num_batched_tokens, 0)
        batch_size = worker.batch_size
        if batch_size:
            pause_s += worker.step_s
        keeps_pace = pause_s <= self._tpot_target_s
        return _Prefill(worker, num_cached_tokens, ready_s, ready_s + own_s * batch_size, price, keeps_pace)

    def _decode(self, worker: WorkerState, asked: _Asked) -> _Decode:
        info = worker.info
        batch_size = worker.batch_size
        context_tokens = worker.batch_context_tokens + asked.context_tokens
        step_s = worker.joined_step_s + worker.context_token_s * asked.context_tokens
        rest_s = step_s * asked.num_steps
        wait_s = 0.0
        if batch_size >= info.max_num_seqs or context_tokens > worker.max_tokens:
            # What does not fit waits until as much has ended.
            excess = max((batch_size + 1) / info.max_num_seqs, context_tokens / worker.max_tokens) - 1
            wait_s = rest_s * excess
            rest_s += wait_s
        delay_s = rest_s + (step_s - worker.step_s) * asked.num_steps * batch_size
        price = info.device.price_per_hour if asked.in_money else 1.0
        cost = price * delay_s
        return _Decode(worker, wait_s, rest_s, cost, price, step_s <= self._tpot_target_s)

    def _cheapest(self, asked: _Asked, decodes: list[_Decode], prefills: list[_Prefill]) -> _Best:
        """The lowest cost of what keeps both targets, if anything does."""
        best = _Best()
        able = [(prefill.price * prefill.delay_s, prefill) for prefill in prefills if prefill.keeps_pace]
        able.sort(key=_first)
        decodes.sort(key=_cost)
        for decode in decodes:
            cost = decode.cost
            if cost >= best.value:
                break  # those that follow cost no less; so below
            slack_s = self._ttft_target_s - decode.wait_s
            if not decode.keeps_pace or slack_s < 0:
                continue
            for prefill_cost, prefill in able:
                if cost + prefill_cost >= best.value:
                    break
                if prefill.ready_s <= slack_s and _fits(prefill, decode):
                    transfer_s = self._transfer_s(asked, prefill, decode)
                    if prefill.ready_s + transfer_s <= slack_s:
                        best.offer(cost + prefill_cost + prefill.price * transfer_s, decode.worker, prefill)
            worker = decode.worker
            if cost + decode.price * worker.least_prefill_s * (1 + worker.batch_size) < best.value:
                own = self._prefill(worker, asked)
                if own.keeps_pace and own.ready_s <= slack_s:
                    best.offer(cost + own.price * own.delay_s, worker, own)
        return best

    def _earliest(
        self, asked: _Asked, decodes: list[_Decode], prefills: list[_Prefill], *, keeping_pace: bool
    ) -> _Best:
        """The earliest finish, of what keeps the pace where it must. Delays of others by a prompt count as its own."""
        best = _Best()
        able = [(prefill.delay_s, prefill) for prefill in prefills if prefill.keeps_pace or not keeping_pace]
        able.sort(key=_first)
        for decode in decodes:
            if keeping_pace and not decode.keeps_pace:
                continue
            own = self._prefill(decode.worker, asked)
            if own.keeps_pace or not keeping_pace:
                best.offer(decode.rest_s + own.delay_s, decode.worker, own)
            for delay_s, prefill in able:
                if decode.rest_s + delay_s >= best.value:
                    break
                if _fits(prefill, decode):
                    finish_s = decode.rest_s + delay_s + self._transfer_s(asked, prefill, decode)
                    best.offer(finish_s, decode.worker, prefill)
        return best

    def _transfer_s(self, asked: _Asked, prefill: _Prefill, decode: _Decode) -> float:
        worker, num_tokens = decode.worker, asked.num_prompt_tokens
        if decode.num_cached_tokens < 0:
            decode.num_cached_tokens = asked.cache.cached_tokens(worker.info, asked.prefixes, num_tokens)
        num_sent_tokens = num_tokens - decode.num_cached_tokens
        return self._costs.transfer_seconds(prefill.worker.worker_id, worker.worker_id, num_sent_tokens)


def _fits(prefill: _Prefill, decode: _Decode) -> bool:
    return not prefills_in_place(decode.worker) and can_hand_over(prefill.worker, decode.worker)
