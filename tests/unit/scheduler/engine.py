"""A batcher with a model that notices when it is given the wrong KV."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Sequence

from kvcache.manager import KVCacheManager
from scheduler.batching import Batcher, BatchLimits, SampledToken, ScheduledChunk, StepPlan
from scheduler.request import Request, SamplingParams
from tests.builders import BLOCK_SIZE, make_manager, make_sampling

VOCAB_SIZE = 50


def next_token(token_ids: Sequence[int]) -> int:
    """The model: any token before it changes what comes next."""
    return zlib.crc32(bytes(token_ids)) % VOCAB_SIZE


def reference_output(prompt_token_ids: Sequence[int], sampling: SamplingParams) -> list[int]:
    """What a sequence must get, computed alone and without a cache."""
    token_ids = list(prompt_token_ids)
    while True:
        token_ids.append(next_token(token_ids))
        output = token_ids[len(prompt_token_ids) :]
        if output[-1] in sampling.stop_token_ids or len(output) == sampling.max_tokens:
            return output


class FakeRunner:
    """Remembers in every cell of the cache whose token of which position was put there last."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int], tuple[str, int, int]] = {}

    def execute(self, plan: StepPlan) -> dict[str, int]:
        """All writes first: a block that two chunks of one step share would show."""
        for chunk in plan.chunks:
            self.write(chunk.request_id, chunk.block_table, chunk.start, chunk.token_ids)
        contexts = {chunk.request_id: self._read(chunk) for chunk in plan.chunks}
        return {chunk.request_id: next_token(contexts[chunk.request_id]) for chunk in plan.chunks if chunk.sampling}

    def write(self, request_id: str, block_table: Sequence[int], start: int, token_ids: Sequence[int]) -> None:
        for position, token_id in enumerate(token_ids, start):
            place = (block_table[position // BLOCK_SIZE], position % BLOCK_SIZE)
            self._cells[place] = (request_id, position, token_id)

    def _read(self, chunk: ScheduledChunk) -> list[int]:
        """The tokens that the chunk's last query attends to, out of the cache."""
        token_ids = []
        for position in range(chunk.end):
            place = (chunk.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE)
            owner, written_position, token_id = self._cells[place]
            assert (owner, written_position) == (chunk.request_id, position), "KV of another token was read"
            token_ids.append(token_id)
        return token_ids


class Engine:
    """Drives one batcher step by step and records what came out."""

    def __init__(self, num_blocks: int, limits: BatchLimits) -> None:
        self.manager: KVCacheManager = make_manager(num_blocks)
        self.batcher = Batcher(self.manager, limits)
        self.runner = FakeRunner()
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[SampledToken]] = {}

    def add(
        self,
        request_id: str,
        num_prompt_tokens: int,
        max_tokens: int = 3,
        *,
        prefill_only: bool = False,
        remote_prefill: bool = False,
        stop_token_ids: tuple[int, ...] = (),
    ) -> Request:
        prompt = tuple((ord(request_id[-1]) + 7 * position) % VOCAB_SIZE for position in range(num_prompt_tokens))
        sampling = make_sampling(max_tokens, stop_token_ids)
        request = Request(request_id, prompt, sampling, prefill_only, remote_prefill)
        self.batcher.add(request)
        self.requests[request_id] = request
        self.outputs[request_id] = []
        return request

    def step(self, failed: Container[str] = (), meanwhile: Callable[[], None] = lambda: None) -> StepPlan | None:
        """One step; ``meanwhile`` happens between plan and apply."""
        plan = self.batcher.plan()
        if plan is not None:
            self.check_plan(plan)
            meanwhile()
            self.apply(plan, failed)
        return plan

    def check_plan(self, plan: StepPlan) -> None:
        limits = self.batcher.limits
        assert sum(len(chunk.token_ids) for chunk in plan.chunks) <= limits.max_num_batched_tokens
        assert self.batcher.num_running <= limits.max_num_seqs
        self.manager.check_integrity()

    def apply(self, plan: StepPlan, failed: Container[str] = ()) -> None:
        sampled = self.runner.execute(plan)
        kept = {request_id: token for request_id, token in sampled.items() if request_id not in failed}
        for output in self.batcher.apply(plan, kept, failed):
            self.outputs[output.request.request_id].append(output)
        self.manager.check_integrity()

    def run(self, max_steps: int = 1000) -> list[StepPlan]:
        """Steps until there is nothing to compute."""
        plans: list[StepPlan] = []
        while (plan := self.step()) is not None:
            plans.append(plan)
            assert len(plans) < max_steps, "no end in sight: a livelock"
        return plans

    def attach(self, request_id: str) -> None:
        """A handoff: another worker has computed the prompt."""
        prompt = self.requests[request_id].prompt_token_ids
        self.runner.write(request_id, self.manager.block_table(request_id), 0, prompt)
        self.outputs[request_id].append(self.batcher.attach(request_id, next_token(prompt)))

    def tokens(self, request_id: str) -> list[int]:
        return [output.token_id for output in self.outputs[request_id]]

    def expected(self, request_id: str) -> list[int]:
        request = self.requests[request_id]
        return reference_output(request.prompt_token_ids, request.sampling)

    def end(self) -> None:
        """Load stops: everything is aborted, and nothing may be left."""
        for request_id in self.requests:
            self.batcher.abort(request_id)
        assert self.batcher.is_idle
        assert (self.batcher.num_running, self.batcher.num_waiting) == (0, 0)
        self.manager.check_idle()


def ids(plan: StepPlan | None) -> list[str]:
    return [] if plan is None else [chunk.request_id for chunk in plan.chunks]
