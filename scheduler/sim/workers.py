"""Modelled workers: they take as long as the cost model says, and keep batch, queue and cache as real ones do.

Left out: preemption (a sequence gets room for its whole answer before it joins) and anything that fails.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.cost_model import CostModel
from scheduler.types import CacheDelta, Placement, WorkerInfo, WorkerLoad


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """One request and what became of it. Times in virtual seconds."""

    request_id: str
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int  # known to nobody before the end
    names: tuple[int, ...] = ()  # of its prompt's blocks of ``tokens_per_name`` tokens
    placement: Placement | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # where its prompt was computed
    num_generated_tokens: int = 0
    first_token_s: float = 0.0
    finished_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens

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


class SimulatedCache:
    """Names of cached blocks, least recently used first to go; tells what came and went."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._names: OrderedDict[int, None] = OrderedDict()
        self._news: dict[int, bool] = {}
        self._sequence = 0

    def num_cached(self, names: Sequence[int]) -> int:
        """Of the first names, up to one that is not here."""
        for number, name in enumerate(names):
            if name not in self._names:
                return number
        return len(names)

    def use(self, names: Sequence[int]) -> None:
        """All of them are here now; a prefix goes from its end."""
        for name in reversed(names):
            if name not in self._names:
                self._news[name] = True
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._capacity:
            self._news[self._names.popitem(last=False)[0]] = False

    def take_news(self) -> CacheDelta:
        added, removed = (
            b"".join(name.to_bytes(8, "little") for name, is_here in self._news.items() if is_here is wanted)
            for wanted in (True, False)
        )
        delta = CacheDelta(self._sequence, added, removed)
        self._news = {}
        self._sequence += 1
        return delta


class SimulatedWorker:
    """One step at a time: a token for each decoding sequence, and a chunk of the oldest prompt."""

    def __init__(self, info: WorkerInfo, costs: CostModel, tokens_per_name: int) -> None:
        self.info = info
        self.busy_s = 0.0
        self.batch: list[SimulatedRequest] = []
        self.prompts: deque[SimulatedRequest] = deque()
        self.arrived: deque[SimulatedRequest] = deque()  # computed, and to be decoded here
        self.max_tokens = info.num_blocks * info.spec.block_size
        self.cache = SimulatedCache(self.max_tokens // tokens_per_name)
        self.is_stepping = False
        self._costs = costs
        self._tokens_per_name = tokens_per_name
        self._tokens_held = 0
        self._chunk = 0  # prompt tokens in the running step
        self._decoding = 0  # sequences in the running step

    @property
    def has_work(self) -> bool:
        return bool(self.batch or self.prompts)

    def load(self) -> WorkerLoad:
        return WorkerLoad(running=len(self.batch), waiting=len(self.prompts) + len(self.arrived))

    def admit(self) -> list[SimulatedRequest]:
        """Those of ``arrived`` that there is room for join the batch, in order, with their first tokens."""
        admitted = []
        while self.arrived and self._has_room(self.arrived[0]):
            request = self.arrived.popleft()
            request.num_generated_tokens = 1
            self.cache.use(request.names)
            if request.num_output_tokens > 1:
                self.batch.append(request)
                self._tokens_held += request.num_tokens
            admitted.append(request)
        return admitted

    def _has_room(self, request: SimulatedRequest) -> bool:
        fits = self._tokens_held + request.num_tokens <= self.max_tokens or not self.batch
        return fits and len(self.batch) < self.info.max_num_seqs

    def cached_tokens(self, request: SimulatedRequest) -> int:
        cached = self.cache.num_cached(request.names) * self._tokens_per_name
        return min(cached, (request.num_prompt_tokens - 1) // self.info.spec.block_size * self.info.spec.block_size)

    def begin_step(self) -> float:
        """Seconds until its end."""
        seconds = 0.0
        worker_id = self.info.worker_id
        self._decoding = len(self.batch)
        if self.batch:
            context = sum(request.num_prompt_tokens + request.num_generated_tokens for request in self.batch)
            seconds += self._costs.decode_step_seconds(worker_id, len(self.batch), context)
        self._chunk = 0
        if self.prompts:
            prompt = self.prompts[0]
            if prompt.num_computed_tokens == 0:
                prompt.num_cached_tokens = prompt.num_computed_tokens = self.cached_tokens(prompt)
            self._chunk = min(prompt.num_prompt_tokens - prompt.num_computed_tokens, self.info.max_num_batched_tokens)
            end = prompt.num_computed_tokens + self._chunk
            seconds += self._costs.prefill_seconds(worker_id, end, prompt.num_computed_tokens)
        self.busy_s += seconds
        self.is_stepping = True
        return seconds

    def end_step(self) -> tuple[list[SimulatedRequest], SimulatedRequest | None]:
        """The sequences that got a token, and the prompt that is now computed."""
        self.is_stepping = False
        decoded = self.batch[: self._decoding]
        for request in decoded:
            request.num_generated_tokens += 1
        self.batch = [request for request in self.batch if not request.is_complete]
        self._tokens_held -= sum(request.num_tokens for request in decoded if request.is_complete)
        if not self._chunk:
            return decoded, None
        prompt = self.prompts[0]
        prompt.num_computed_tokens += self._chunk
        if prompt.num_computed_tokens < prompt.num_prompt_tokens:
            return decoded, None
        self.prompts.popleft()
        self.cache.use(prompt.names)
        return decoded, prompt
