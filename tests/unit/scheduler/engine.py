"""A batcher with a model that notices when it is given the wrong KV."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Sequence

from kvcache.manager import KVCacheManager
from scheduler.batching import Batcher, BatchLimits
from scheduler.request import Request, SamplingParams
from scheduler.step_plan import SampledToken, ScheduledChunk, StepOutput, StepPlan
from scheduler.urgency import ServiceClass, Urgency
from tests.builders import BLOCK_SIZE, make_manager, make_sampling

VOCAB_SIZE = 50
INTERACTIVE = Urgency()
BATCH = Urgency(ServiceClass.BATCH)


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
    """Remembers in every cell of the cache which token was put there last, and what came before that token."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int], tuple[int, int]] = {}  # (block, place in it) → (token, digest up to it)

    def execute(self, plan: StepPlan) -> dict[str, int]:
        """All writes first: a block that two chunks of one step write to would show."""
        for chunk in plan.chunks:
            self.write(chunk.block_table, chunk.start, chunk.token_ids)
        contexts = {chunk.request_id: self._read(chunk) for chunk in plan.chunks}
        return {chunk.request_id: next_token(contexts[chunk.request_id]) for chunk in plan.chunks if chunk.sampling}

    def write(self, block_table: Sequence[int], start: int, token_ids: Sequence[int]) -> None:
        digest = self._cells[place_of(block_table, start - 1)][1] if start else 0
        for position, token_id in enumerate(token_ids, start):
            digest = digest_after(digest, token_id)
            self._cells[place_of(block_table, position)] = (token_id, digest)

    def spoil(self, chunk: ScheduledChunk) -> None:
        """The step went wrong: what it wrote is not what it should have written."""
        for position in range(chunk.start, chunk.end):
            self._cells[place_of(chunk.block_table, position)] = (0, -1)

    def _read(self, chunk: ScheduledChunk) -> list[int]:
        """The tokens that the chunk's last query attends to, out of the cache."""
        token_ids: list[int] = []
        digest = 0
        for position in range(chunk.end):
            token_id, written_digest = self._cells[place_of(chunk.block_table, position)]
            digest = digest_after(digest, token_id)
            assert written_digest == digest, "KV of another context was read"
            token_ids.append(token_id)
        assert tuple(token_ids[chunk.start :]) == chunk.token_ids
        return token_ids


def place_of(block_table: Sequence[int], position: int) -> tuple[int, int]:
    return block_table[position // BLOCK_SIZE], position % BLOCK_SIZE


def digest_after(digest: int, token_id: int) -> int:
    """KV of a token depends on all tokens before it."""
    return zlib.crc32(bytes([token_id]), digest)


class Engine:
    """Drives one batcher step by step and records what came out."""

    def __init__(self, num_blocks: int, limits: BatchLimits, *, prefix_caching: bool = True) -> None:
        self.manager: KVCacheManager = make_manager(num_blocks, prefix_caching=prefix_caching)
        self.batcher = Batcher(self.manager, limits)
        self.runner = FakeRunner()
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[SampledToken]] = {}

    def add(
        self,
        request_id: str,
        num_prompt_tokens: int = 0,
        max_tokens: int = 3,
        *,
        prefill_only: bool = False,
        remote_prefill: bool = False,
        stop_token_ids: tuple[int, ...] = (),
        prompt: Sequence[int] | None = None,
        cache_salt: bytes = b"",
        urgency: Urgency = INTERACTIVE,
    ) -> Request:
        """Without ``prompt``, one of that length that depends on the last letter of the name."""
        if prompt is None:
            prompt = [(ord(request_id[-1]) + 7 * position) % VOCAB_SIZE for position in range(num_prompt_tokens)]
        sampling = make_sampling(max_tokens, stop_token_ids)
        request = Request(
            request_id, tuple(prompt), sampling, prefill_only, remote_prefill, cache_salt, urgency=urgency
        )
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
        for chunk in plan.chunks:
            self._check_writes(chunk)
        self._check_salts()

    def _check_writes(self, chunk: ScheduledChunk) -> None:
        """A block that a step writes to is in no other table and in no index."""
        assert chunk.token_ids
        for position in range(chunk.start, chunk.end):
            block_id = chunk.block_table[position // BLOCK_SIZE]
            holders = [each for each in self.requests if block_id in self.manager.block_table(each)]
            assert holders == [chunk.request_id]
            assert block_id not in self.manager.pool.prefixes

    def _check_salts(self) -> None:
        salts: dict[int, bytes] = {}
        for request_id, request in self.requests.items():
            for block_id in self.manager.block_table(request_id):
                assert salts.setdefault(block_id, request.cache_salt) == request.cache_salt

    def apply(self, plan: StepPlan, failed: Container[str] = ()) -> None:
        sampled = self.runner.execute(plan)
        for chunk in plan.chunks:
            if chunk.request_id in failed:
                self.runner.spoil(chunk)
        kept = {request_id: token for request_id, token in sampled.items() if request_id not in failed}
        for output in self.batcher.apply(plan, StepOutput(kept), failed):
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
        """A handoff: another worker has computed the prompt and sent what is not cached here."""
        request = self.requests[request_id]
        prompt, start = request.prompt_token_ids, request.num_computed_tokens
        self.runner.write(self.manager.block_table(request_id), start, prompt[start:])
        self.outputs[request_id].append(self.batcher.attach(request_id, next_token(prompt)))

    def break_handoff(self, request_id: str, num_tokens: int) -> bool:
        """A handoff that broke when so many tokens of the prompt were here. True: the rest is computed here."""
        request = self.requests[request_id]
        start = request.num_computed_tokens
        self.runner.write(self.manager.block_table(request_id), start, request.prompt_token_ids[start:num_tokens])
        return self.batcher.keep_received(request_id, num_tokens)

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
