"""A step that is planned while the one before it runs, and begins before that one is booked."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from scheduler.request import FinishReason
from scheduler.step_plan import UNKNOWN_TOKEN, StepOutput, StepPlan
from tests.unit.scheduler.conftest import MakeEngine
from tests.unit.scheduler.engine import Engine, ids


def nothing() -> None:
    pass


def run_ahead(engine: Engine, meanwhile: Callable[[], None] = nothing) -> list[StepPlan]:
    """One planned step, and all that follow it without being planned anew.

    What follows has computed when the step before it is booked; ``meanwhile`` happens while it computes.
    """
    plan = engine.batcher.plan()
    assert plan is not None
    engine.check_plan(plan)
    plans = [plan]
    sampled = engine.runner.execute(plan)
    while True:
        following = follow(engine, plan, sampled)
        next_sampled = engine.runner.execute(following) if following is not None else {}
        meanwhile()
        for output in engine.batcher.apply(plan, StepOutput(sampled), following=following):
            engine.outputs[output.request.request_id].append(output)
        engine.manager.check_integrity()
        if following is None:
            return plans
        plans.append(following)
        plan, sampled = following, next_sampled


def follow(engine: Engine, plan: StepPlan, sampled: dict[str, int]) -> StepPlan | None:
    """The next step with its tokens, if none of them ends its sequence."""
    ahead = engine.batcher.plan_ahead(plan)
    if ahead is None:
        return None
    assert all(chunk.token_ids == (UNKNOWN_TOKEN,) and chunk.num_prompt_tokens == 0 for chunk in ahead.chunks)
    chunks = [replace(chunk, token_ids=(sampled[chunk.request_id],)) for chunk in ahead.chunks]
    stops = any(chunk.sampling and chunk.token_ids[0] in chunk.sampling.stop_token_ids for chunk in chunks)
    return None if stops else StepPlan(tuple(chunks))


def test_decoding_goes_on_until_the_last_sequence_ends(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", 5, max_tokens=9)
    engine.add("b", 3, max_tokens=4)
    engine.step()
    plans = run_ahead(engine)
    assert [ids(plan) for plan in plans] == [["a", "b"]] * 3 + [["a"]] * 5
    assert engine.batcher.is_idle
    for name in "ab":
        assert engine.tokens(name) == engine.expected(name)
        assert engine.outputs[name][-1].finish_reason is FinishReason.LENGTH


def test_it_is_the_step_that_would_be_planned_afterwards(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for name in "abc":
        engine.add(name, 6, max_tokens=8)
    engine.step()
    plan = engine.batcher.plan()
    assert plan is not None
    ahead = engine.batcher.plan_ahead(plan)
    assert ahead is not None
    engine.apply(plan)
    planned = engine.batcher.plan()
    assert planned is not None
    assert planned == StepPlan(
        tuple(replace(chunk, token_ids=(engine.requests[chunk.request_id].token_ids[-1],)) for chunk in ahead.chunks)
    )
    engine.apply(planned)


def test_what_was_planned_ahead_may_be_forgotten(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", 4, max_tokens=20)
    engine.step()
    while (plan := engine.batcher.plan()) is not None:
        engine.batcher.plan_ahead(plan)
        engine.apply(plan)
    assert engine.tokens("a") == engine.expected("a")


def test_a_stop_token_ends_its_sequence_before_the_next_step(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("without-a", 4, max_tokens=8)
    engine.add("a", 4, max_tokens=8, stop_token_ids=(engine.expected("without-a")[3],))
    engine.step()
    while not engine.batcher.is_idle:
        run_ahead(engine)
    assert engine.tokens("a") == engine.expected("without-a")[:4]
    assert engine.tokens("without-a") == engine.expected("without-a")


@pytest.mark.parametrize("what", ["prompt", "prompt to hand over", "penalties"])
def test_nothing_is_planned_ahead_of(make_engine: MakeEngine, what: str) -> None:
    engine = make_engine(max_num_batched_tokens=4)
    if what == "penalties":
        request = engine.add("a", 3, max_tokens=5)
        request.sampling = replace(request.sampling, presence_penalty=1.0)
        engine.step()
    else:
        engine.add("a", 9, max_tokens=5, prefill_only=what == "prompt to hand over")
    plan = engine.batcher.plan()
    assert plan is not None and engine.batcher.plan_ahead(plan) is None
    engine.apply(plan)


def test_nobody_who_waits_is_passed_when_a_sequence_ends(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    engine.add("a", 4, max_tokens=3)
    engine.add("b", 4, max_tokens=9)
    engine.add("c", 4, max_tokens=2)
    engine.step()
    assert [ids(plan) for plan in run_ahead(engine)] == [["a", "b"]] * 2
    assert ids(engine.step()) == ["b", "c"]


def test_without_blocks_for_the_next_tokens_the_step_is_planned_as_ever(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=4)
    engine.add("old", 4, max_tokens=13)
    engine.add("young", 4, max_tokens=8)
    while not engine.batcher.is_idle:
        run_ahead(engine)
    assert engine.batcher.num_preemptions > 0
    for name in ("old", "young"):
        assert engine.tokens(name) == engine.expected(name)


def test_an_abort_meanwhile_keeps_the_blocks_until_the_step_that_runs_is_booked(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", 4, max_tokens=9)
    engine.add("b", 4, max_tokens=9)
    engine.step()
    held: list[int] = []

    def abort() -> None:
        engine.batcher.abort("a")
        held.append(len(engine.manager.block_table("a")))

    plans = run_ahead(engine, abort)
    assert [ids(plan) for plan in plans] == [["a", "b"], ["a", "b"]]
    assert held == [2, 2] and engine.manager.block_table("a") == []
    engine.run()
    assert engine.tokens("b") == engine.expected("b")


@pytest.mark.parametrize("seed", range(30))
def test_any_mix_gets_its_reference_tokens(make_engine: MakeEngine, seed: int) -> None:
    rng = random.Random(seed)
    engine = make_engine(num_blocks=rng.randint(8, 24), max_num_seqs=rng.randint(1, 5), max_num_batched_tokens=12)
    aborted: set[str] = set()

    def meanwhile() -> None:
        if rng.random() < 0.2 and len(engine.requests) < 15:
            engine.add(f"{len(engine.requests)}{rng.choice('xyz')}", rng.randint(1, 9), max_tokens=rng.randint(1, 12))
        if rng.random() < 0.1:
            name = rng.choice(list(engine.requests))
            aborted.add(name)
            engine.batcher.abort(name)

    engine.add("first", 5, max_tokens=20)
    while not engine.batcher.is_idle:
        run_ahead(engine, meanwhile)
    for name in engine.requests:
        tokens, expected = engine.tokens(name), engine.expected(name)
        assert tokens == (expected[: len(tokens)] if name in aborted else expected)
