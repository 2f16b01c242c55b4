"""Arrivals, aborts, failures and handoffs in any order, in caches of any size: every sequence that nobody
ended gets exactly the tokens that it would have got alone, and nothing leaks."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache.errors import OverloadedError, RequestError
from scheduler.batching import BatchLimits
from scheduler.request import RequestStatus
from scheduler.step_plan import StepPlan
from scheduler.urgency import Urgency
from tests.builders import check_interleavings
from tests.unit.scheduler.engine import BATCH, INTERACTIVE, Engine

INDEX = st.integers(0, 11)
KIND = st.sampled_from(["local", "remote", "prefill_only"])


class BatcherUnderLoad(RuleBasedStateMachine):
    """Plan and apply are two rules, so that anything can happen while a step runs."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(1, BatchLimits())
        self.plan: StepPlan | None = None
        self.ended_by_us: set[str] = set()

    @initialize(
        num_blocks=st.integers(3, 14),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 24),
        max_num_waiting=st.integers(1, 8),
        prefix_caching=st.sampled_from([True, True, False]),
    )
    def choose_size(
        self,
        num_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_waiting: int,
        prefix_caching: bool,
    ) -> None:
        limits = BatchLimits(max_num_seqs, max_num_batched_tokens, max_num_waiting)
        self.engine = Engine(num_blocks, limits, prefix_caching=prefix_caching)

    @rule(
        num_prompt_tokens=st.integers(1, 14),
        max_tokens=st.integers(1, 12),
        kind=KIND,
        follows=INDEX,
        cache_salt=st.sampled_from([b"", b"", b"", b"another"]),
        urgency=st.sampled_from([INTERACTIVE, INTERACTIVE, BATCH, Urgency(priority=-1)]),
    )
    def arrive(
        self, num_prompt_tokens: int, max_tokens: int, kind: str, follows: int, cache_salt: bytes, urgency: Urgency
    ) -> None:
        """Many prompts begin like another: as that one alone, or with what came after it."""
        batcher, manager = self.engine.batcher, self.engine.manager
        earlier = list(self.engine.requests.values())[-1 - follows % 3 :][:1]
        text = (earlier[0].token_ids if earlier else []) + [(follows + each) % 50 for each in range(14)]
        room = num_prompt_tokens + (0 if kind == "prefill_only" else max_tokens - 1)
        is_full = batcher.num_waiting >= batcher.limits.max_num_waiting
        try:
            self.engine.add(
                f"r{len(self.engine.requests)}",
                max_tokens=max_tokens,
                prompt=text[:num_prompt_tokens],
                cache_salt=cache_salt,
                prefill_only=kind == "prefill_only",
                remote_prefill=kind == "remote",
                urgency=urgency,
            )
        except RequestError:
            refused_rightly = room > manager.max_tokens
        except OverloadedError:
            refused_rightly = is_full
        else:
            refused_rightly = room <= manager.max_tokens and not is_full
        assert refused_rightly

    @rule(index=INDEX)
    def abort(self, index: int) -> None:
        request_id = f"r{index}"
        if self.engine.batcher.find(request_id) is not None:
            self.ended_by_us.add(request_id)
        self.engine.batcher.abort(request_id)

    @rule()
    def reserve(self) -> None:
        self.engine.batcher.reserve_handoffs()

    @rule(index=INDEX)
    def attach(self, index: int) -> None:
        request = self.engine.batcher.find(f"r{index}")
        if request is not None and request.status is RequestStatus.WAITING_FOR_KV:
            self.engine.attach(request.request_id)

    @rule(index=INDEX)
    def complete(self, index: int) -> None:
        request = self.engine.batcher.find(f"r{index}")
        if request is not None and request.status is RequestStatus.HANDING_OVER:
            self.engine.batcher.complete_handoff(request.request_id)

    @precondition(lambda self: self.plan is None)
    @rule()
    def plan_step(self) -> None:
        self.plan = self.engine.batcher.plan()
        if self.plan is not None:
            self.engine.check_plan(self.plan)

    @precondition(lambda self: self.plan is not None)
    @rule(failed=st.sampled_from([None, None, None, 0, 1]))
    def apply_step(self, failed: int | None) -> None:
        """``failed`` is the place in the step of a sequence that cannot be computed."""
        plan = self.plan
        assert plan is not None
        failed_ids = {plan.chunks[failed].request_id} if failed is not None and failed < len(plan.chunks) else set()
        self.ended_by_us |= failed_ids
        self.engine.apply(plan, failed_ids)
        self.plan = None

    @invariant()
    def books_are_right(self) -> None:
        self.engine.manager.check_integrity()
        assert self.engine.manager.num_unaccounted() == 0

    def teardown(self) -> None:
        """No more arrivals: all that is there finishes."""
        if self.plan is not None:
            self.apply_step(None)
        for _ in range(3000):
            if self.engine.batcher.is_idle:
                break
            self._serve_once()
        assert self.engine.batcher.is_idle, "a livelock"
        for request_id, request in self.engine.requests.items():
            expected = self.engine.expected(request_id)[: 1 if request.prefill_only else None]
            tokens = self.engine.tokens(request_id)
            if request_id in self.ended_by_us:
                assert tokens == expected[: len(tokens)]
            else:
                assert tokens == expected
        self.engine.end()

    def _serve_once(self) -> None:
        batcher = self.engine.batcher
        batcher.reserve_handoffs()
        progress = self.engine.step() is not None
        for request_id in self.engine.requests:
            request = batcher.find(request_id)
            if request is not None and request.status is RequestStatus.WAITING_FOR_KV:
                self.engine.attach(request_id)
                progress = True
            elif request is not None and request.status is RequestStatus.HANDING_OVER:
                batcher.complete_handoff(request_id)
                progress = True
        assert progress, "there is work and nobody makes progress"


def test_every_sequence_gets_its_reference_tokens_whatever_happens_around_it() -> None:
    check_interleavings(BatcherUnderLoad, max_examples=100)
