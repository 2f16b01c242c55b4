"""Which logits of a prompt are asked for: each once, few at a time, whatever happens to the sequence."""

from __future__ import annotations

from dataclasses import replace

from scheduler.batching import MAX_PROMPT_LOGITS, Batcher, BatchLimits
from scheduler.request import Request, SamplingParams, TokenLogprobs
from scheduler.step_plan import SampledToken, StepOutput, StepPlan
from tests.builders import make_manager, make_sampling

WITH_PROMPT = replace(make_sampling(max_tokens=6), prompt_logprobs=2)


def stand_in(position: int) -> TokenLogprobs:
    """For the prompt token at ``position``."""
    return TokenLogprobs(-float(position), position, (), ())


def make_batcher(num_blocks: int = 200, max_num_batched_tokens: int = 512) -> Batcher:
    return Batcher(make_manager(num_blocks), BatchLimits(max_num_batched_tokens=max_num_batched_tokens))


def add(batcher: Batcher, name: str, num_tokens: int, sampling: SamplingParams = WITH_PROMPT) -> Request:
    request = Request(name, tuple(range(num_tokens)), sampling)
    batcher.add(request)
    return request


def step(batcher: Batcher) -> tuple[StepPlan, list[SampledToken]]:
    """Computes a step: token ids of these prompts are their positions."""
    plan = batcher.plan()
    assert plan is not None
    told = {chunk.request_id: tuple(map(stand_in, chunk.prompt_targets)) for chunk in plan.chunks}
    tokens = {chunk.request_id: 0 for chunk in plan.chunks if chunk.sampling}
    return plan, batcher.apply(plan, StepOutput(tokens, prompt_logprobs=told))


def run(batcher: Batcher) -> tuple[list[StepPlan], list[SampledToken]]:
    plans, outputs = [], []
    while not batcher.is_idle:
        plan, output = step(batcher)
        plans.append(plan)
        outputs += output
        assert len(plans) < 500, "a livelock"
    return plans, outputs


def test_every_prompt_token_but_the_first_is_told_once_with_the_first_output_token() -> None:
    batcher = make_batcher()
    names = {name: 1 + 90 * index for index, name in enumerate("abcd")}
    for name, num_tokens in names.items():
        add(batcher, name, num_tokens)
    _, outputs = run(batcher)
    for name, num_tokens in names.items():
        first, *rest = [output.prompt_logprobs for output in outputs if output.request.request_id == name]
        assert first == tuple(map(stand_in, range(1, num_tokens)))
        assert not any(rest)


def test_the_rows_of_one_step_are_few() -> None:
    batcher = make_batcher()
    for name in "abc":
        add(batcher, name, 200)
    plans, _ = run(batcher)
    rows = [sum(len(chunk.prompt_targets) for chunk in plan.chunks) for plan in plans]
    assert max(rows) == MAX_PROMPT_LOGITS
    assert sum(rows) == 3 * 199


def test_logits_are_asked_for_at_the_tokens_before_the_targets() -> None:
    batcher = make_batcher(max_num_batched_tokens=10)
    add(batcher, "a", 25)
    plans, _ = run(batcher)
    targets = [plan.chunks[0].prompt_targets for plan in plans[:3]]
    assert targets == [tuple(range(1, 11)), tuple(range(11, 21)), tuple(range(21, 25))]
    assert [plan.logit_rows for plan in plans[:4]] == [list(range(10)), list(range(10)), list(range(5)), [0]]


def test_rows_are_counted_over_all_chunks_of_a_step() -> None:
    batcher = make_batcher()
    add(batcher, "plain", 7, make_sampling())
    add(batcher, "told", 8)
    plan, _ = step(batcher)
    assert plan.logit_rows == list(range(6, 7 + 8))


def test_a_preemption_repeats_and_loses_nothing() -> None:
    """Blocks of four tokens for 24: the second sequence is preempted in its prompt, and again while it decodes."""
    batcher = make_batcher(num_blocks=6, max_num_batched_tokens=7)
    add(batcher, "old", 8, replace(WITH_PROMPT, max_tokens=10))
    young = add(batcher, "young", 9, replace(WITH_PROMPT, max_tokens=8))
    _, outputs = run(batcher)
    assert young.num_preemptions > 0
    for name, num_tokens in (("old", 8), ("young", 9)):
        told = [output.prompt_logprobs for output in outputs if output.request.request_id == name]
        assert told[0] == tuple(map(stand_in, range(1, num_tokens)))
        assert not any(told[1:])


def test_only_sequences_whose_choice_depends_on_it_carry_their_history() -> None:
    batcher = make_batcher()
    add(batcher, "plain", 3, make_sampling())
    penalized = replace(make_sampling(), frequency_penalty=1.0)
    request = Request("penalized", (1, 2, 3, 4), penalized, num_delivered_tokens=1)
    batcher.add(request)
    for num_output in (1, 2):
        plan, _ = step(batcher)
        histories = {chunk.request_id: chunk.history for chunk in plan.chunks}
        plain, told = histories["plain"], histories["penalized"]
        assert plain is None
        assert told is not None
        assert (told.num_tokens, told.num_output_tokens) == (3 + num_output, num_output)
