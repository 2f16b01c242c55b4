"""What goes over the wire comes back as it was."""

from __future__ import annotations

import pytest

from kvcache.errors import RequestError
from scheduler.request import SamplingParams, TokenLogprobs
from scheduler.urgency import MAX_PRIORITY, ServiceClass, Urgency
from workers import worker_pb2 as pb
from workers.messages import (
    LOGPROBS_IN_MESSAGE,
    logprobs_from_wire,
    logprobs_to_wire,
    prompt_logprobs_to_wire,
    sampling_from_wire,
    sampling_to_wire,
    urgency_from_wire,
    urgency_to_wire,
)

FULL = SamplingParams(
    max_tokens=9,
    temperature=0.5,
    top_p=0.9,
    top_k=3,
    seed=-(2**63),
    stop_token_ids=(1, 2),
    min_p=0.1,
    presence_penalty=-0.5,
    frequency_penalty=1.5,
    repetition_penalty=1.1,
    logit_bias=((7, -2.5), (8, 0.25)),
    bad_words=((1,), (2, 3)),
    allowed_token_ids=(4, 5),
    min_tokens=3,
    logprobs=0,
    prompt_logprobs=20,
)
LOGPROBS = TokenLogprobs(-0.5, 3, (7, 1), (-0.125, float("-inf")))


def test_sampling_parameters_come_back_field_by_field() -> None:
    bare = SamplingParams(1)
    assert all(getattr(FULL, name) != getattr(bare, name) for name in SamplingParams.__slots__)
    for sampling in (FULL, bare):
        wire = pb.SamplingParams.FromString(sampling_to_wire(sampling).SerializeToString())
        assert sampling_from_wire(wire) == sampling


def test_a_sender_that_knows_no_penalty_asks_for_none() -> None:
    assert not sampling_from_wire(pb.SamplingParams(max_tokens=1)).has_penalties


def test_log_probabilities_come_back_bit_by_bit() -> None:
    wire = pb.TokenLogprobs.FromString(logprobs_to_wire(LOGPROBS).SerializeToString())
    assert logprobs_from_wire(wire) == LOGPROBS


def test_a_long_prompt_s_log_probabilities_go_in_bounded_messages() -> None:
    slices = list(prompt_logprobs_to_wire([LOGPROBS] * (2 * LOGPROBS_IN_MESSAGE + 5)))
    assert [len(each) for each in slices] == [LOGPROBS_IN_MESSAGE, LOGPROBS_IN_MESSAGE, 5]


def test_class_and_priority_come_back() -> None:
    for urgency in (Urgency(), Urgency(ServiceClass.BATCH, -MAX_PRIORITY), Urgency(priority=MAX_PRIORITY)):
        assert urgency_from_wire(urgency_to_wire(urgency)) == urgency
    assert urgency_from_wire(pb.GenerateRequest().urgency) == Urgency()


@pytest.mark.parametrize("priority", [MAX_PRIORITY + 1, -MAX_PRIORITY - 1])
def test_a_priority_out_of_bounds_is_refused_at_the_wire(priority: int) -> None:
    with pytest.raises(RequestError, match="priority"):
        urgency_from_wire(pb.Urgency(priority=priority))
