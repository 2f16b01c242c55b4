"""Whose turn it is to compute a prompt, and how long a step may take."""

from __future__ import annotations

import pytest

from scheduler.batching import MIN_PROMPT_TOKENS, PATIENCE, BatchLimits
from tests.unit.scheduler.conftest import MakeEngine
from tests.unit.scheduler.engine import Engine, ids


def test_a_short_prompt_does_not_wait_for_a_long_one_that_has_begun(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.add("long", 40)
    engine.step()
    engine.add("short", 5)
    plan = engine.step()
    assert plan is not None
    assert {chunk.request_id: len(chunk.token_ids) for chunk in plan.chunks} == {"short": 5, "long": 3}


@pytest.mark.parametrize("num_prompt_tokens", [16, 24])
def test_a_long_prompt_is_overtaken_by_a_multiple_of_its_own_work(
    make_engine: MakeEngine, num_prompt_tokens: int
) -> None:
    """Short prompts that take a whole step come one after the other, without end."""
    engine = make_engine(max_num_batched_tokens=8)
    engine.add("long", num_prompt_tokens)
    overtaken = 0
    for index in range(100):
        engine.add(f"short-{index}", 8, max_tokens=1)
        if "long" in ids(engine.step()):
            break
        overtaken += 8
    assert overtaken == PATIENCE * (num_prompt_tokens - 8)  # the short ones are patient, too
    engine.run()


def test_a_prompt_does_not_overtake_one_before_it_that_does_not_fit(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=5)
    engine.add("a", 12, max_tokens=2)
    engine.step()
    engine.add("large", 9)
    engine.add("late", 9)
    assert ids(engine.step()) == ["a"]
    assert ids(engine.step()) == ["large"]


def test_sequences_whose_answer_has_begun_go_first(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=8, max_num_batched_tokens=16)
    engine.add("long", 16, max_tokens=17)
    engine.step()
    engine.add("short", 1, max_tokens=13)
    plans = engine.run()
    assert engine.batcher.num_preemptions > 0
    assert all(ids(plan)[0] == "long" for plan in plans[:16])


# How long a step may take


@pytest.mark.parametrize(
    ("tokens_per_s", "size"),
    [(None, 512), (10_000.0, 512), (1000.0, 250), (500.0, 125), (1.0, MIN_PROMPT_TOKENS)],
)
def test_a_slow_worker_computes_fewer_prompt_tokens_in_a_step(tokens_per_s: float | None, size: int) -> None:
    limits = BatchLimits(max_num_batched_tokens=512, max_step_s=0.25, max_pause_s=0.1)
    engine = Engine(num_blocks=400, limits=limits)
    engine.add("a", 1400, max_tokens=2)
    plan = engine.batcher.plan(tokens_per_s)
    assert plan is not None and len(plan.chunks[0].token_ids) == size
    engine.apply(plan)
    engine.end()


def test_where_time_is_short_a_first_token_does_not_wait_for_a_piece_of_another_prompt() -> None:
    engine = Engine(num_blocks=400, limits=BatchLimits(max_step_s=0.25, max_pause_s=0.25))
    engine.add("long", 900)
    plan = engine.batcher.plan(1000.0)
    assert plan is not None
    engine.apply(plan)
    engine.add("short", 100)
    engine.add("shorter", 50)
    sizes = []
    for _ in range(2):
        plan = engine.batcher.plan(1000.0)
        assert plan is not None
        sizes.append({chunk.request_id: len(chunk.token_ids) for chunk in plan.chunks if chunk.num_prompt_tokens})
        engine.apply(plan)
    assert sizes == [{"shorter": 50, "short": 100}, {"long": 250}]
    engine.end()


def test_a_pause_of_those_that_decode_is_shorter_than_a_step_may_be() -> None:
    engine = Engine(num_blocks=400, limits=BatchLimits(max_num_batched_tokens=512, max_step_s=0.5, max_pause_s=0.1))
    engine.add("decoding", 3, max_tokens=9)
    engine.step()
    engine.add("prompt", 600)
    plan = engine.batcher.plan(1000.0)
    assert plan is not None and [len(chunk.token_ids) for chunk in plan.chunks] == [1, 100]
    engine.apply(plan)
    engine.end()
