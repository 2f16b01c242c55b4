"""A sequence's statuses, its limits, and when it ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from kvcache.errors import InvariantError, RequestError
from scheduler.request import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    FinishReason,
    Request,
    RequestStatus,
    SamplingParams,
    check_sequence,
)
from tests.builders import make_sampling

WAITING, WAITING_FOR_KV, RUNNING, HANDING_OVER, FINISHED = RequestStatus
LEGAL = {
    (WAITING, WAITING_FOR_KV),  # its blocks are reserved, a prefill worker was asked
    (WAITING, RUNNING),
    (WAITING, FINISHED),  # aborted
    (WAITING_FOR_KV, RUNNING),  # attached
    (WAITING_FOR_KV, WAITING),  # to be prefilled again
    (WAITING_FOR_KV, FINISHED),  # aborted, or the handoff failed
    (RUNNING, WAITING),  # preempted
    (RUNNING, HANDING_OVER),  # prefilled
    (RUNNING, FINISHED),
    (HANDING_OVER, FINISHED),  # acknowledged or aborted
}
MAX_MODEL_LEN = 20
VOCAB_SIZE = 50
SAMPLING = make_sampling(max_tokens=4)


def make_request(prompt: tuple[int, ...] = (1, 2, 3), sampling: SamplingParams = SAMPLING) -> Request:
    return Request("r", prompt, sampling)


def check(prompt: tuple[int, ...], sampling: SamplingParams = SAMPLING) -> None:
    check_sequence(prompt, sampling, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)


def refused_field(prompt: tuple[int, ...], sampling: SamplingParams = SAMPLING) -> str | None:
    with pytest.raises(RequestError) as caught:
        check(prompt, sampling)
    return caught.value.param


@pytest.mark.parametrize(("before", "after"), [*product(RequestStatus, RequestStatus)])
def test_a_status_changes_as_listed_and_no_other_way(before: RequestStatus, after: RequestStatus) -> None:
    request = make_request()
    request.status = before
    if (before, after) in LEGAL:
        request.move_to(after)
        assert request.status is after
    else:
        with pytest.raises(InvariantError, match=f"from {before.value} to {after.value}"):
            request.move_to(after)
        assert request.status is before


@pytest.mark.parametrize("num_prompt_tokens", [1, 10, MAX_MODEL_LEN - 1])
def test_prompt_and_answer_may_fill_the_context(num_prompt_tokens: int) -> None:
    sampling = make_sampling(max_tokens=MAX_MODEL_LEN - num_prompt_tokens)
    check((0,) * num_prompt_tokens, sampling)
    longer = replace(sampling, max_tokens=sampling.max_tokens + 1)
    assert refused_field((0,) * num_prompt_tokens, longer) == "max_tokens"


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_an_answer_has_at_least_one_token(max_tokens: int) -> None:
    assert refused_field((1,), make_sampling(max_tokens)) == "max_tokens"


@pytest.mark.parametrize("num_prompt_tokens", [0, MAX_MODEL_LEN, MAX_MODEL_LEN + 1])
def test_a_prompt_that_is_empty_or_fills_the_context_is_refused(num_prompt_tokens: int) -> None:
    assert refused_field((0,) * num_prompt_tokens, make_sampling(max_tokens=1)) == "prompt"


def test_a_prompt_that_is_too_long_is_told_both_numbers() -> None:
    with pytest.raises(RequestError, match=r"21 tokens.* 20 "):
        check((0,) * (MAX_MODEL_LEN + 1))


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**40])
def test_a_token_outside_the_vocabulary_is_refused(token_id: int) -> None:
    check((0, VOCAB_SIZE - 1))
    assert refused_field((0, token_id, 1)) == "prompt"


@pytest.mark.parametrize(
    ("field", "allowed", "refused"),
    [
        ("temperature", [0.0, 5e-324, 1.0, 2.0], [-0.1, 2.1, float("nan"), float("inf")]),
        ("top_p", [0.0, 0.5, 1.0], [-0.1, 1.1, float("nan"), float("-inf")]),
        ("top_k", [0, 1, VOCAB_SIZE], [-1, VOCAB_SIZE + 1]),
    ],
)
def test_a_sampling_parameter_outside_its_range_is_refused_by_name(
    field: str, allowed: list[float], refused: list[float]
) -> None:
    for value in allowed:
        check((1,), replace(SAMPLING, **{field: value}))
    for value in refused:
        assert refused_field((1,), replace(SAMPLING, **{field: value})) == field


def test_a_sequence_ends_with_its_last_allowed_token() -> None:
    request = make_request(sampling=make_sampling(max_tokens=3))
    assert [request.append_token(token) for token in (7, 8, 9)] == [None, None, FinishReason.LENGTH]
    assert (request.token_ids, request.num_output_tokens) == ([1, 2, 3, 7, 8, 9], 3)


def test_a_sequence_ends_with_a_stop_token() -> None:
    request = make_request(sampling=make_sampling(max_tokens=9, stop_token_ids=(5, 8)))
    assert [request.append_token(token) for token in (7, 8)] == [None, FinishReason.STOP]


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    request = make_request(sampling=make_sampling(max_tokens=1, stop_token_ids=(8,)))
    assert request.append_token(8) is FinishReason.STOP


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    request = make_request(prompt=(8, 8), sampling=make_sampling(max_tokens=9, stop_token_ids=(8,)))
    assert request.append_token(7) is None


def test_uncomputed_tokens_are_the_rest_of_the_prompt_then_one() -> None:
    request = make_request(prompt=(1, 2, 3))
    assert request.num_uncomputed_tokens == 3
    request.num_computed_tokens = 3
    request.append_token(7)
    assert request.num_uncomputed_tokens == 1


def test_sampled_tokens_leave_the_prompt_as_it_was() -> None:
    request = make_request(prompt=(1, 2, 3))
    request.append_token(7)
    assert (request.prompt_token_ids, request.num_prompt_tokens) == ((1, 2, 3), 3)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"logit_bias": ((VOCAB_SIZE, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias"),
        ({"logit_bias": ((1, 1.0),) * (MAX_LOGIT_BIAS + 1)}, "logit_bias"),
        ({"bad_words": ((),)}, "bad_words"),
        ({"bad_words": ((1, VOCAB_SIZE),)}, "bad_words"),
        ({"bad_words": ((1,) * (MAX_BAD_WORD_TOKENS + 1),)}, "bad_words"),
        ({"bad_words": ((1,),) * (MAX_BAD_WORDS + 1)}, "bad_words"),
        ({"allowed_token_ids": (VOCAB_SIZE,)}, "allowed_token_ids"),
        ({"allowed_token_ids": (1,) * (VOCAB_SIZE + 1)}, "allowed_token_ids"),
        ({"allowed_token_ids": (1, 2), "bad_words": ((1,), (2,))}, "allowed_token_ids"),
        ({"allowed_token_ids": (1,), "stop_token_ids": (1,), "min_tokens": 1}, "allowed_token_ids"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logprobs": MAX_LOGPROBS + 1}, "logprobs"),
        ({"prompt_logprobs": MAX_LOGPROBS + 1}, "prompt_logprobs"),
    ],
    ids=repr,
)
def test_a_parameter_out_of_its_range_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    assert refused_field((1, 2, 3), replace(SAMPLING, **change)) == param


def test_the_ends_of_every_range_are_accepted() -> None:
    last = VOCAB_SIZE - 1
    for sampling in (
        replace(SAMPLING, min_p=1.0, presence_penalty=2.0, frequency_penalty=-2.0, repetition_penalty=100.0),
        replace(SAMPLING, logit_bias=((last, -100.0), (0, 100.0)), bad_words=((last,),), min_tokens=4),
        replace(SAMPLING, allowed_token_ids=(0, last), logprobs=MAX_LOGPROBS, prompt_logprobs=0),
    ):
        check((1, 2, 3), sampling)


def test_delivered_tokens_count_for_min_tokens_and_are_fewer_than_the_prompt() -> None:
    def check_placed_anew(min_tokens: int, num_delivered_tokens: int) -> None:
        check_sequence(
            (1, 2, 3),
            replace(SAMPLING, min_tokens=min_tokens),
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            num_delivered_tokens=num_delivered_tokens,
        )

    check_placed_anew(min_tokens=6, num_delivered_tokens=2)
    with pytest.raises(RequestError, match="min_tokens"):
        check_placed_anew(min_tokens=7, num_delivered_tokens=2)
    with pytest.raises(RequestError, match="3 of 3"):
        check_placed_anew(min_tokens=0, num_delivered_tokens=3)
