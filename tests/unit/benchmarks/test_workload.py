"""The plan of a run and its prompts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.traces import MOONCAKE_BLOCK_TOKENS, TraceRow
from benchmarks.workload import (
    LengthRange,
    PlannedRequest,
    PromptMaker,
    SyntheticLoad,
    offered_rate,
    plan_synthetic,
    plan_trace,
    shorten_inputs,
)

LOAD = SyntheticLoad(4.0, 1.0, 50, None, LengthRange(10, 20), LengthRange(8, 8))
PROMPTS = PromptMaker(seed=0, low_id=1000, high_id=30000)


def test_lengths_are_parsed_and_drawn_inside_their_range() -> None:
    assert LengthRange.parse("256") == LengthRange(256, 256)
    assert LengthRange.parse("uniform:3:5") == LengthRange(3, 5)
    plan = plan_synthetic(replace(LOAD, num_prompts=500), seed=0)
    assert {request.input_tokens for request in plan} == set(range(10, 21))
    assert {request.output_tokens for request in plan} == {8}


@pytest.mark.parametrize("text", ["0", "-1", "x", "uniform:5:3", "uniform:0:3", "uniform:5", "1:2"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"length|invalid literal"):
        LengthRange.parse(text)


def test_a_plan_repeats_under_its_seed_and_changes_with_it() -> None:
    assert plan_synthetic(LOAD, seed=3) == plan_synthetic(LOAD, seed=3)
    assert plan_synthetic(LOAD, seed=3) != plan_synthetic(LOAD, seed=4)


def test_other_lengths_leave_the_arrivals_alone() -> None:
    longer = plan_synthetic(replace(LOAD, input_lengths=LengthRange(500, 900)), seed=3)
    assert [request.arrival_s for request in longer] == [request.arrival_s for request in plan_synthetic(LOAD, 3)]


def test_count_and_duration_together_both_limit() -> None:
    assert len(plan_synthetic(replace(LOAD, duration_s=1000.0), seed=0)) == 50
    short = plan_synthetic(replace(LOAD, duration_s=2.0), seed=0)
    assert 0 < len(short) < 50
    assert short[-1].arrival_s < 2.0


def test_a_trace_is_replayed_faster_and_cut_after_scaling() -> None:
    rows = [TraceRow(float(second), 5, 6, (second,)) for second in range(10)]
    plan = plan_trace(rows, scale=2.0, num_prompts=8, duration_s=2.0)
    assert plan == [PlannedRequest(n, n / 2, 5, 6, (n,)) for n in range(4)]
    assert offered_rate(plan) == 4 / 1.5


def test_the_rate_of_requests_that_come_at_once_is_infinite() -> None:
    assert math.isinf(offered_rate([PlannedRequest(0, 0.0, 1, 1)]))


def test_prompts_have_the_planned_length_and_safe_ids() -> None:
    for input_tokens in (1, 511, 512, 1300):
        ids = PROMPTS.token_ids(PlannedRequest(0, 0.0, input_tokens, 1, (4, 5)))
        assert len(ids) == input_tokens
        assert ids.min() >= 1000
        assert ids.max() < 30000


def test_prompts_share_exactly_the_tokens_of_their_common_prefix_blocks() -> None:
    first = PROMPTS.token_ids(PlannedRequest(0, 0.0, 3 * MOONCAKE_BLOCK_TOKENS, 1, (1, 2, 3)))
    second = PROMPTS.token_ids(PlannedRequest(1, 0.0, 3 * MOONCAKE_BLOCK_TOKENS, 1, (1, 2, 9)))
    shared = 2 * MOONCAKE_BLOCK_TOKENS
    assert (first[:shared] == second[:shared]).all()
    assert not (first[shared : shared + 8] == second[shared : shared + 8]).all()


def test_a_shortened_prompt_is_a_prefix_of_the_full_one() -> None:
    request = PlannedRequest(0, 0.0, 1000, 1, (1, 2))
    (short,) = shorten_inputs([request], 600)
    assert (PROMPTS.token_ids(short) == PROMPTS.token_ids(request)[:600]).all()


def test_requests_without_prefix_blocks_and_the_warm_up_share_nothing() -> None:
    request, other = PlannedRequest(0, 0.0, 50, 1), PlannedRequest(1, 0.0, 50, 1)
    ids = PROMPTS.token_ids(request)
    assert (ids == PROMPTS.token_ids(request)).all()
    assert not (ids[:8] == PROMPTS.token_ids(other)[:8]).all()
    assert not (ids[:8] == PROMPTS.for_warm_up().token_ids(request)[:8]).all()


def test_a_chat_prompt_has_one_word_per_token() -> None:
    assert len(PROMPTS.words(PlannedRequest(0, 0.0, 40, 1)).split()) == 40
