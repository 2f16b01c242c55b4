"""The stages of one sequence, by times that the test sets."""

from __future__ import annotations

import pytest

from workers import worker_pb2 as pb
from workers.stages import Stage, StageClock, seconds_by_stage


def test_a_handed_over_sequence_goes_through_all_stages() -> None:
    clock = StageClock(now=10.0)
    clock.reserve(10.5)
    clock.take_prompt(pb.PromptSeconds(queue=1.0, compute=2.0))
    for now, begun_s in ((13.75, None), (14.0, 13.8), (14.25, 13.8), (15.0, 13.8)):
        clock.token(now, begun_s)
    assert seconds_by_stage(clock.seconds()) == {
        Stage.QUEUE_DECODE: 0.5,
        Stage.QUEUE_PREFILL: 1.0,
        Stage.PREFILL: 2.0,
        Stage.TRANSFER: 0.25,
        Stage.FIRST_DECODE: 0.25,
        Stage.DECODE: 1.0,
    }


def test_the_stages_of_a_sequence_add_up_to_its_time_on_the_worker() -> None:
    clock = StageClock(now=1.0)
    clock.reserve(1.25)
    clock.take_prompt(pb.PromptSeconds(queue=0.5, compute=0.5))
    clock.token(3.0, None)
    clock.token(4.0, 3.5)
    assert sum(seconds_by_stage(clock.seconds()).values()) == pytest.approx(3.0)


def test_in_place_there_is_no_transfer() -> None:
    clock = StageClock(now=0.0)
    clock.token(3.0, begun_s=1.0)
    clock.token(3.5, begun_s=1.0)
    assert seconds_by_stage(clock.seconds()) == {
        Stage.QUEUE_PREFILL: 1.0,
        Stage.PREFILL: 2.0,
        Stage.FIRST_DECODE: 0.5,
        Stage.DECODE: 0.0,
    }


def test_what_is_not_known_is_not_told() -> None:
    """The prefill worker's word may come after the commit, and a sequence of one token does not decode."""
    clock = StageClock(now=0.0)
    clock.reserve(0.25)
    clock.token(3.0, None)
    assert seconds_by_stage(clock.seconds()) == {Stage.QUEUE_DECODE: 0.25}


def test_a_transfer_that_computing_hides_takes_no_time() -> None:
    clock = StageClock(now=0.0)
    clock.reserve(0.0)
    clock.take_prompt(pb.PromptSeconds(queue=0.0, compute=2.5))  # by another clock
    clock.token(2.0, None)
    assert seconds_by_stage(clock.seconds())[Stage.TRANSFER] == 0.0
