"""Workers in virtual time: the real ``Batcher`` over the real block manager, and steps that take as long as predicted.

Left out: the tokens themselves, bytes, and anything that fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvcache.manager import KVCacheManager
from scheduler.batching import STEPS_PER_FIRST_TOKEN, Batcher, BatchLimits
from scheduler.cache_index import pack_names
from scheduler.cost_model import CostModel
from scheduler.request import Request, SamplingParams
from scheduler.step_plan import SampledToken, StepOutput, StepPlan
from scheduler.step_times import step_times
from scheduler.tenants import DEFAULT_TENANT
from scheduler.types import CacheDelta, Placement, WorkerInfo, WorkerLoad
from scheduler.urgency import ORDINARY, Urgency

END_TOKEN = 0  # of every answer
_FIRST_OWN_TOKEN = 1 << 31  # those below stand for names
_MAX_NAMES = 1 << 16  # in one heartbeat
_NO_LIMIT = 1 << 30


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One request and what became of it. Times in virtual seconds."""

    request_id: str
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int  # known to nobody before the end
    names: tuple[int, ...] = ()  # of its prompt's blocks of ``tokens_per_name`` tokens; equal ones hold equal tokens
    tenant: str = DEFAULT_TENANT
    urgency: Urgency = ORDINARY
    placement: Placement | None = None
    num_cached_tokens: int = 0  # where its prompt was computed
    num_generated_tokens: int = 0
    first_token_s: float = 0.0
    finished_s: float | None = None
    refused_s: float | None = None

    @property
    def is_complete(self) -> bool:
        return self.num_generated_tokens >= self.num_output_tokens

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """0 for an answer of one token."""
        assert self.finished_s is not None, "it has ended"
        return (self.finished_s - self.first_token_s) / max(1, self.num_output_tokens - 1)


def prompt_of(request: SimulatedRequest, number: int, tokens_per_name: int) -> tuple[int, ...]:
    """Its tokens: equal for equal names, and behind these its own, which no request of another number has."""
    tokens = [name + 1 for name in request.names for _ in range(tokens_per_name)][: request.num_prompt_tokens]
    return (*tokens, *[_FIRST_OWN_TOKEN + number] * (request.num_prompt_tokens - len(tokens)))


class SimulatedWorker:
    """One step at a time; ``batcher`` says of what.

    Args:
        ttft_target_s, tpot_target_s: they limit steps in time, as a server's options do.
    """

    def __init__(self, info: WorkerInfo, costs: CostModel, ttft_target_s: float, tpot_target_s: float) -> None:
        self.info = info
        self.busy_s = 0.0
        limits = BatchLimits(
            info.max_num_seqs,
            info.max_num_batched_tokens,
            _NO_LIMIT,
            ttft_target_s / STEPS_PER_FIRST_TOKEN,
            tpot_target_s,
        )
        self.batcher = Batcher(KVCacheManager(info.spec, info.num_blocks), limits)
        self.is_stepping = False
        self._costs = costs
        chunk = info.max_num_batched_tokens
        self._prompt_tokens_per_s = chunk / costs.prefill_seconds(info.worker_id, chunk)
        self._prefixes = self.batcher.manager.pool.prefixes
        self._prefixes.tell_anew()
        self._num_deltas = 0

    def load(self) -> WorkerLoad:
        return WorkerLoad(running=self.batcher.num_running, waiting=self.batcher.num_waiting)

    def take_cache_news(self) -> CacheDelta:
        news = self._prefixes.take_news(_MAX_NAMES)
        delta = CacheDelta(self._num_deltas, pack_names(news.added), pack_names(news.removed))
        self._num_deltas += 1
        return delta

    def add(
        self,
        request: SimulatedRequest,
        prompt: tuple[int, ...],
        max_tokens: int,
        *,
        prefill_only: bool = False,
        remote_prefill: bool = False,
    ) -> None:
        sampling = SamplingParams(1 if prefill_only else max_tokens, stop_token_ids=(END_TOKEN,))
        self.batcher.add(
            Request(request.request_id, prompt, sampling, prefill_only, remote_prefill, urgency=request.urgency)
        )

    def plan(self) -> StepPlan | None:
        return self.batcher.plan(self._prompt_tokens_per_s)

    def begin_step(self, plan: StepPlan) -> float:
        """Seconds until its end."""
        self.is_stepping = True
        seconds = self.step_seconds(plan)
        self.busy_s += seconds
        return seconds

    def end_step(self, plan: StepPlan, requests: Iterable[SimulatedRequest]) -> list[SampledToken]:
        """``requests``: those that the plan samples a token for, in order."""
        self.is_stepping = False
        tokens = {request.request_id: next_token(request) for request in requests}
        return self.batcher.apply(plan, StepOutput(tokens))

    def step_seconds(self, plan: StepPlan) -> float:
        """What the cost model says of decoding and of prompts, added up, as it predicts them for placement.

        Prompts of one step go through the linear layers together, and each has its own pairs of attention: the cost
        model is asked for one prompt with as many tokens and as many pairs.
        """
        counts, seconds = step_times(plan.chunks, 0.0), 0.0
        if counts.decode_tokens:
            seconds += self._costs.decode_step_seconds(self.info.worker_id, counts.decode_tokens, counts.context_tokens)
        if num_tokens := counts.prompt_tokens:
            end = round(counts.prompt_pairs / num_tokens + (num_tokens - 1) / 2)
            seconds += self._costs.prefill_seconds(self.info.worker_id, end, end - num_tokens)
        return seconds


def next_token(request: SimulatedRequest) -> int:
    """The end where it has been promised, and before it nothing that anybody else has."""
    return END_TOKEN if request.num_generated_tokens + 1 >= request.num_output_tokens else _FIRST_OWN_TOKEN - 1
