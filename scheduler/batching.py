"""One step of one worker: who joins, who leaves, how many tokens of whom are computed next.

Continuous batching (Orca, OSDI 2022) with chunked prefill under a token budget (Sarathi-Serve, OSDI 2024).
A prompt chunk and a decoding sequence are the same thing here: a sequence with tokens whose KV is missing.

Sequences have an order (``Request.order``): class, then priority, then turn. Who is first in it joins first, gets its
share of a step's budget first and is preempted last. A batch sequence is also preempted to let an interactive one
join. The first of all is never preempted, so it makes progress; the others follow when there is room.

A turn is counted in tokens of this worker's work: those computed so far, and ``PATIENCE`` times those that the
prompt brings. So a short prompt does not wait for a long one that has begun, and a long one is overtaken by at most
``PATIENCE`` times its own work, whatever arrives. Once their answer has begun, sequences go first, by arrival.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import count

from kvcache.errors import InvariantError, OverloadedError, RequestError
from kvcache.lease import BlockLease
from kvcache.manager import KVCacheManager
from kvcache.prefix import HashChain
from scheduler.request import FinishReason, Request, RequestStatus, TokenLogprobs
from scheduler.step_plan import UNKNOWN_TOKEN, SampledToken, ScheduledChunk, StepOutput, StepPlan
from scheduler.urgency import ServiceClass

MAX_PROMPT_LOGITS = 128  # rows of one step: a row is as long as the vocabulary
STEPS_PER_FIRST_TOKEN = 8  # that a TTFT target should hold where it limits steps
PATIENCE = 4  # how many times its own work a prompt lets shorter ones go before it
MIN_PROMPT_TOKENS = 64  # of a step, however slow: fewer cost nearly as much


@dataclass(frozen=True, slots=True)
class BatchLimits:
    max_num_seqs: int = 64  # sequences that hold blocks at once
    max_num_batched_tokens: int = 512  # tokens computed in one step
    max_num_waiting: int = 1024  # beyond this, new work is refused
    # Prompts are cut so that no step takes longer, for who arrives meanwhile waits for it; None: whatever it takes.
    max_step_s: float | None = None
    max_pause_s: float | None = None  # the same where others decode: they pause meanwhile


@dataclass(slots=True)
class _PromptBudget:
    """Prompt tokens that a step may still take."""

    left: int
    is_of_time: bool = False  # then a prompt's end does not wait for a piece of another prompt


class Batcher:
    """The sequences of one worker. One event loop owns it; a step may run elsewhere between plan and apply.

    Blocks that a running step writes to are not given back before ``apply``: an abort in between waits. Nor can
    another sequence share them before: full blocks are cached when the step that filled them is booked.
    """

    def __init__(self, manager: KVCacheManager, limits: BatchLimits) -> None:
        self.manager = manager
        self.limits = limits
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # tokens of sequences that began here
        self.prefix_cache_hits = 0  # those of them whose KV was here already
        self.num_resumed_blocks = 0  # kept of handoffs that broke
        self._requests: dict[str, Request] = {}
        self._waiting: list[Request] = []  # both in order
        self._running: list[Request] = []
        self._hashes: dict[str, HashChain] = {}  # of the sequences in _requests
        self._arrivals = count()
        self._num_computed = 0  # tokens, ever
        self._in_step: frozenset[str] = frozenset()
        self._aborted_in_step: set[str] = set()

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks: in the batch, or in a handoff."""
        return len(self._requests) - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._requests

    def find(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Queues a new sequence.

        Raises:
            RequestError: it could not run here even alone, or its id is taken.
            OverloadedError: the queue is full.
        """
        if not request.prompt_token_ids:
            raise RequestError("The prompt is empty.", "prompt")
        # The last sampled token is never computed, so its KV needs no room.
        num_tokens = request.num_prompt_tokens + (0 if request.prefill_only else request.sampling.max_tokens - 1)
        if num_tokens > self.manager.max_tokens:
            raise RequestError(
                f"The request needs KV for {num_tokens} tokens; the cache of this worker holds"
                f" {self.manager.max_tokens}.",
                "max_tokens",
            )
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is in use", "request_id")
        if len(self._waiting) >= self.limits.max_num_waiting:
            raise OverloadedError(f"{len(self._waiting)} requests are waiting on this worker already.")
        self._requests[request.request_id] = request
        self._hashes[request.request_id] = HashChain(request.cache_salt, self.manager.spec.block_size)
        request.arrival = next(self._arrivals)
        if request.num_delivered_tokens == 0:
            num_cached_tokens = len(self._find_prefix(request)) * self.manager.spec.block_size
            request.turn = self._num_computed + PATIENCE * (request.num_prompt_tokens - num_cached_tokens)
        self._wait(request)

    def reserve_handoffs(self) -> list[Request]:
        """Gives blocks to waiting sequences whose prompt another worker computes, in order.

        They are in WAITING_FOR_KV afterwards; the caller starts their handoffs. Their first
        ``num_computed_tokens`` tokens are cached here and need not be sent. May be called while a step runs: then
        nobody is preempted for them.
        """
        reserved = []
        while self._waiting and self._waiting[0].remote_prefill:
            request = self._waiting[0]
            if not self._in_step:
                self._make_room(request)
            if not self._admit(request):
                break
            self._waiting.pop(0)
            request.move_to(RequestStatus.WAITING_FOR_KV)
            reserved.append(request)
        return reserved

    def lease_for_arrival(self, request_id: str, transfer_id: str, now: float) -> BlockLease:
        """Decode side: reserves the blocks of the prompt that are not cached here for the handoff to write to."""
        request = self._requests[request_id]
        first_block = request.num_computed_tokens // self.manager.spec.block_size
        block_ids = self.manager.block_table(request_id)[first_block:]
        self.manager.check_writable(request_id, first_block, first_block + len(block_ids))
        return self.manager.leases.open(
            transfer_id, request_id, block_ids, now, first_block=first_block, num_tokens=request.num_prompt_tokens
        )

    def attach(self, request_id: str, first_token_id: int, num_cached_tokens: int = 0) -> SampledToken:
        """A handoff was committed: the prompt's KV is in the sequence's blocks, and its first token is known.

        Args:
            num_cached_tokens: of the prompt, on the worker that prefilled it.

        Raises:
            InvariantError: the sequence does not wait for KV.
        """
        request = self._requests.get(request_id)
        if request is None or request.status is not RequestStatus.WAITING_FOR_KV:
            raise InvariantError(f"request {request_id} does not wait for KV")
        self._computed(request, request.num_prompt_tokens)
        request.num_cached_tokens = num_cached_tokens
        self._join(request)
        return self._append(request, first_token_id)

    def keep_received(self, request_id: str, num_tokens: int) -> bool:
        """A handoff broke after the KV of the prompt's first ``num_tokens`` tokens had been verified.

        Whole blocks of it are cached, so that another placement of this sequence begins with them. True: what is
        left is one step's work at most, less than another handoff; the sequence has joined the batch with what it
        has, cached or not. False: the caller is to end it.
        """
        request = self._requests.get(request_id)
        if request is None or request.status is not RequestStatus.WAITING_FOR_KV:
            raise InvariantError(f"request {request_id} does not wait for KV")
        block_size = self.manager.spec.block_size
        num_blocks = min(num_tokens, request.num_prompt_tokens - 1) // block_size  # the last token gives the logits
        num_kept = num_blocks - request.num_computed_tokens // block_size
        if num_kept <= 0:
            return False
        self._computed(request, num_blocks * block_size)
        fits = request.num_uncomputed_tokens <= self.limits.max_num_batched_tokens
        # The logits of the tokens before were computed elsewhere and are lost.
        is_resumed = fits and request.sampling.prompt_logprobs is None
        if is_resumed:
            request.remote_prefill = False
            self._join(request)
        if is_resumed or self.manager.prefix_caching:
            self.num_resumed_blocks += num_kept
        return is_resumed

    def plan(self, prompt_tokens_per_s: float | None = None) -> StepPlan | None:
        """The next step, or None when there is nothing to compute. Call ``apply`` before the next ``plan``.

        ``prompt_tokens_per_s`` is what this worker computes; None where that is not known yet.
        """
        if self._in_step:
            raise InvariantError("plan was called twice without apply")
        self._admit_over_batch()
        chunks = self._plan_decode()
        budget = self._prompt_budget(len(chunks), prompt_tokens_per_s)
        for service_class in ServiceClass:
            self._plan_prompts(chunks, budget, service_class)
        plan = StepPlan(tuple(chunks)) if chunks else None
        self._in_step = _ids(plan)
        return plan

    def plan_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after ``plan``, which runs, for the case that nobody joins, leaves or meets a stop token meanwhile.

        Its tokens are ``UNKNOWN_TOKEN``. None where more than the tokens will change, or their room is missing. It may
        be forgotten: sequences have the blocks for their next tokens then already.
        """
        if len(plan.chunks) != len(self._running) or not all(map(self._is_plain_decode, plan.chunks)):
            return None
        going_on = [chunk for chunk in plan.chunks if self._goes_on(chunk)]
        if self._waiting and len(going_on) < len(plan.chunks):
            return None  # somebody may join in the place of one that ends
        chunks = []
        for chunk in going_on:
            end = chunk.end + 1
            if not self.manager.extend(chunk.request_id, end):
                return None
            last_block = self.manager.spec.num_blocks_for(end) - 1
            self.manager.check_writable(chunk.request_id, last_block, last_block + 1)
            table = tuple(self.manager.block_table(chunk.request_id))
            chunks.append(ScheduledChunk(chunk.request_id, (UNKNOWN_TOKEN,), chunk.end, 0, table, chunk.sampling))
        return StepPlan(tuple(chunks)) if chunks else None

    def apply(
        self,
        plan: StepPlan,
        output: StepOutput,
        failed: Container[str] = (),
        following: StepPlan | None = None,
    ) -> list[SampledToken]:
        """Books a finished step.

        Args:
            output: holds a token for every chunk with ``sampling`` that did not fail.
            failed: ids of sequences that could not be computed; they end and give their blocks back.
            following: the step that was planned ahead, if it runs by now: its sequences keep their blocks.
        """
        self._in_step = _ids(following)
        aborted = self._aborted_in_step - self._in_step
        outputs = []
        for chunk in plan.chunks:
            request = self._requests[chunk.request_id]
            if chunk.request_id in failed:
                self.manager.distrust(chunk.request_id)
                self._finish(request, FinishReason.ABORT)
                continue
            self._computed(request, chunk.end)
            if chunk.request_id in aborted:
                self._finish(request, FinishReason.ABORT)
                continue
            request.prompt_logprobs += output.prompt_logprobs.get(chunk.request_id, ())
            if chunk.sampling is not None:
                token_id, logprobs = output.tokens[chunk.request_id], output.logprobs.get(chunk.request_id)
                outputs.append(self._append(request, token_id, logprobs))
        self._aborted_in_step &= self._in_step
        return outputs

    def lease_for_handoff(self, request_id: str, transfer_id: str, now: float, first_block: int = 0) -> BlockLease:
        """Protects a running prefill-only sequence's prompt, from ``first_block`` on, while it is sent."""
        spec = self.manager.spec
        end_block = spec.num_blocks_for(self._requests[request_id].num_prompt_tokens)
        block_ids = self.manager.block_table(request_id)[first_block:end_block]
        return self.manager.leases.open(transfer_id, request_id, block_ids, now, first_block=first_block)

    def complete_handoff(self, request_id: str) -> None:
        """Prefill side: the other side has acknowledged; the blocks are given back."""
        self._finish(self._requests[request_id], FinishReason.STOP)

    def abort(self, request_id: str) -> None:
        """Ends a sequence, whatever it is doing. Harmless when it has ended already."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request_id in self._in_step:
            self._aborted_in_step.add(request_id)
        else:
            self._finish(request, FinishReason.ABORT)

    def _is_plain_decode(self, chunk: ScheduledChunk) -> bool:
        """Whether the next step can be planned before this one has sampled."""
        request = self._requests[chunk.request_id]
        return (
            request.num_uncomputed_tokens == 1
            and not request.prefill_only
            and chunk.history is None  # it grows when the step is booked: too late for the next
            and not chunk.prompt_targets
            and chunk.request_id not in self._aborted_in_step
        )

    def _goes_on(self, chunk: ScheduledChunk) -> bool:
        """Whether the token that the running step samples is not the last for its length."""
        request = self._requests[chunk.request_id]
        return request.num_output_tokens + 1 < request.sampling.max_tokens

    def _admit_over_batch(self) -> None:
        """Interactive sequences for one step's budget that can join only in the place of batch ones."""
        budget = self.limits.max_num_batched_tokens
        while budget > 0 and self._waiting and not self._waiting[0].remote_prefill:
            request = self._waiting[0]
            if not self._make_room(request) or not self._admit(request):
                break
            self._waiting.pop(0)
            self._join(request)
            budget -= request.num_uncomputed_tokens

    def _plan_decode(self) -> list[ScheduledChunk]:
        """One token for every decoding sequence, in order, preempting the last where blocks run out."""
        chunks: list[ScheduledChunk] = []
        for request in tuple(self._running):
            if len(chunks) == self.limits.max_num_batched_tokens:
                break
            is_decoding = request.status is RequestStatus.RUNNING and request.num_uncomputed_tokens == 1
            if is_decoding and self._grow(request):
                chunks.append(self._chunk(request, 1))
        return chunks

    def _prompt_budget(self, num_decoding: int, tokens_per_s: float | None) -> _PromptBudget:
        """For a step with so many decoding sequences, by its limits in tokens and in time."""
        most = self.limits.max_num_batched_tokens - num_decoding
        longest_s = self.limits.max_pause_s if num_decoding else self.limits.max_step_s
        if tokens_per_s is None or longest_s is None or tokens_per_s * longest_s >= most:
            return _PromptBudget(most)
        left = min(most, max(MIN_PROMPT_TOKENS, int(tokens_per_s * longest_s)))
        return _PromptBudget(left, is_of_time=left < most)

    def _plan_prompts(self, chunks: list[ScheduledChunk], budget: _PromptBudget, service_class: ServiceClass) -> None:
        """Shares the budget among a class's prompts, those under way and those that join now, in order."""
        under_way = [
            running
            for running in self._running
            if running.num_uncomputed_tokens > 1 and running.urgency.service_class is service_class
        ]
        for request in under_way:
            self._plan_waiting(chunks, budget, service_class, before=request)
            self._add_prompt_chunk(chunks, request, budget)
        self._plan_waiting(chunks, budget, service_class)

    def _plan_waiting(
        self,
        chunks: list[ScheduledChunk],
        budget: _PromptBudget,
        service_class: ServiceClass,
        before: Request | None = None,
    ) -> None:
        """Lets a class's waiting sequences join, in order, while budget, blocks and places last; only those that go
        ``before`` another, if that is given."""
        while budget.left > 0 and self._waiting:
            request = self._waiting[0]
            if request.remote_prefill or request.urgency.service_class is not service_class:
                break
            if before is not None and before.order < request.order:
                break
            if not self._admit(request):
                break
            self._waiting.pop(0)
            self._join(request)
            self._add_prompt_chunk(chunks, request, budget)

    def _add_prompt_chunk(self, chunks: list[ScheduledChunk], request: Request, budget: _PromptBudget) -> None:
        """Plans the next tokens of a prompt under both budgets, of tokens and of rows of prompt logits."""
        start = request.num_computed_tokens
        num_tokens = min(request.num_uncomputed_tokens, budget.left)
        if num_tokens < request.num_uncomputed_tokens and budget.is_of_time and _has_end(chunks):
            return
        room = MAX_PROMPT_LOGITS - sum(len(chunk.prompt_targets) for chunk in chunks)
        if request.wanted_prompt_logits(start, start + num_tokens) > room:
            num_tokens = max(start, len(request.prompt_logprobs)) + room - start
        if num_tokens > 0:
            chunks.append(self._chunk(request, num_tokens))
            budget.left -= num_tokens

    def _chunk(self, request: Request, num_tokens: int) -> ScheduledChunk:
        start = request.num_computed_tokens
        end = start + num_tokens
        spec = self.manager.spec
        self.manager.check_writable(request.request_id, start // spec.block_size, spec.num_blocks_for(end))
        is_last = end == len(request.token_ids)
        num_targets = request.wanted_prompt_logits(start, end)
        last_target = min(end, request.num_prompt_tokens - 1)
        return ScheduledChunk(
            request.request_id,
            tuple(request.token_ids[start:end]),
            start,
            max(0, min(end, request.num_prompt_tokens) - start),
            tuple(self.manager.block_table(request.request_id)),
            request.sampling if is_last else None,
            request.history if is_last else None,
            request.prompt_token_ids[last_target + 1 - num_targets : last_target + 1] if num_targets else (),
            request.sampling.prompt_logprobs or 0,
        )

    def _admit(self, request: Request) -> bool:
        """Takes blocks for all tokens of a waiting sequence, cached ones for its prefix, or says not now."""
        prefix = self._find_prefix(request)
        if not self._could_begin(request, prefix):
            return False
        has_begun = self.manager.begin(request.request_id, len(request.token_ids), prefix)
        assert has_begun, "there was room"
        request.num_computed_tokens = len(prefix) * self.manager.spec.block_size
        self._count_hits(request)
        return True

    def _make_room(self, request: Request) -> bool:
        """Preempts batch sequences for an interactive one, the last first, as many as it takes.

        Call it between steps only. False, and nothing done, where that is not needed or would not help.
        """
        preemptible = self._preemptible_for(request)
        if not preemptible or self.num_running - len(preemptible) >= self.limits.max_num_seqs:
            return False
        prefix = self._find_prefix(request)
        if self._could_begin(request, prefix) or not self._could_begin(request, prefix, preemptible):
            return False
        while preemptible and not self._could_begin(request, prefix):
            self._preempt(preemptible.pop())
        return True

    def _preemptible_for(self, request: Request) -> list[Request]:
        """Those that may be preempted to let a waiting sequence join, in order."""
        if request.urgency.is_batch:
            return []
        return [running for running in self._running if running.urgency.is_batch and not running.prefill_only]

    def _could_begin(self, request: Request, prefix: Sequence[int], without: Sequence[Request] = ()) -> bool:
        """Whether there are a place and blocks, once those in ``without`` have given back theirs.

        One block per growing sequence stays free, so that joining does not cause a preemption at once.
        """
        if self.num_running - len(without) >= self.limits.max_num_seqs:
            return False
        growing = sum(not running.prefill_only for running in self._running) - len(without)
        needed = self.manager.num_blocks_to_begin(len(request.token_ids), prefix) + growing
        given_back = self.manager.num_blocks_held_by((each.request_id for each in without), besides=prefix)
        return needed <= self.manager.num_free + given_back

    def _find_prefix(self, request: Request) -> list[int]:
        """Cached blocks to begin with. Tokens whose logits are needed are computed, and so is always the last."""
        if not self.manager.prefix_caching:
            return []
        num_tokens = len(request.token_ids) - 1
        if request.sampling.prompt_logprobs is not None and not request.remote_prefill:
            num_tokens = min(num_tokens, request.num_known_prompt_logits)
        num_blocks = num_tokens // self.manager.spec.block_size
        return self.manager.find_prefix(self._hashes_of(request)[:num_blocks])

    def _count_hits(self, request: Request) -> None:
        """Once per sequence; one that was preempted mostly finds what it computed itself."""
        if request.num_preemptions == 0:
            self.prefix_cache_queries += len(request.token_ids)
            self.prefix_cache_hits += request.num_computed_tokens
            request.num_cached_tokens = request.num_computed_tokens
        elif request.num_output_tokens == 0:
            request.num_cached_tokens = min(request.num_cached_tokens, request.num_computed_tokens)

    def _hashes_of(self, request: Request) -> Sequence[bytes]:
        return self._hashes[request.request_id].hashes(request.token_ids)

    def _computed(self, request: Request, num_tokens: int) -> None:
        """The KV of the first ``num_tokens`` tokens is whole: those of its blocks that are now full are cached."""
        block_size = self.manager.spec.block_size
        first_block, end_block = request.num_computed_tokens // block_size, num_tokens // block_size
        self._num_computed += num_tokens - request.num_computed_tokens
        request.num_computed_tokens = num_tokens
        if self.manager.prefix_caching and end_block > first_block:
            self.manager.cache(request.request_id, self._hashes_of(request)[first_block:end_block], first_block)

    def _grow(self, request: Request) -> bool:
        """Makes room for the sequence's next token; False when it must sit this step out.

        A prompt that is being handed over keeps its blocks: they are sent while it is computed, and come back soon.
        """
        while not self.manager.extend(request.request_id, len(request.token_ids)):
            preemptible = [running for running in self._running if not running.prefill_only]
            if preemptible == [request]:
                return False  # the missing blocks are in handoffs, which end soon
            self._preempt(preemptible[-1])
            if preemptible[-1] is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Takes all blocks of a sequence back; it computes prompt and output again when there is room."""
        self._running.remove(request)
        self.manager.free(request.request_id)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.remote_prefill = False
        self.num_preemptions += 1
        request.move_to(RequestStatus.WAITING)
        self._wait(request)

    def _wait(self, request: Request) -> None:
        insort(self._waiting, request, key=lambda waiting: waiting.order)

    def _join(self, request: Request) -> None:
        request.move_to(RequestStatus.RUNNING)
        insort(self._running, request, key=lambda running: running.order)

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None = None) -> SampledToken:
        finish_reason = request.append_token(token_id)
        prompt_logprobs = tuple(request.prompt_logprobs) if request.num_output_tokens == 1 else ()
        if request.prefill_only:
            self._running.remove(request)
            request.move_to(RequestStatus.HANDING_OVER)
        elif finish_reason is not None:
            self._finish(request, finish_reason)
        elif request.turn > 0:
            self._running.remove(request)
            request.turn = 0
            insort(self._running, request, key=lambda running: running.order)
        return SampledToken(request, token_id, finish_reason, logprobs, prompt_logprobs)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
        elif request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        request.finish_reason = reason
        request.move_to(RequestStatus.FINISHED)
        del self._requests[request.request_id], self._hashes[request.request_id]
        self.manager.free(request.request_id)


def _ids(plan: StepPlan | None) -> frozenset[str]:
    return frozenset(chunk.request_id for chunk in plan.chunks) if plan is not None else frozenset()


def _has_end(chunks: Sequence[ScheduledChunk]) -> bool:
    """Whether a prompt's first token comes of this step."""
    return any(chunk.num_prompt_tokens and chunk.sampling is not None for chunk in chunks)
