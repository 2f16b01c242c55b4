"""What a worker tells of its steps and handoffs."""

from __future__ import annotations

from scheduler.step_plan import ScheduledChunk
from scheduler.step_times import step_times
from scheduler.types import StepTimes, TransferTimes
from tests.builders import make_scheduled
from workers.step_times import MAX_KINDS, StepLedger, TransferLedger


def decoding(request_id: str, position: int) -> ScheduledChunk:
    return ScheduledChunk(request_id, (7,), position, 0, (0,), None)


def prompt(num_tokens: int, start: int = 0) -> ScheduledChunk:
    return make_scheduled("p", [1] * num_tokens, start, [0])


def test_a_step_is_told_by_what_it_computes() -> None:
    """Every prompt token attends to all before it and to itself: 2 chunks, of 3 tokens after 4 and of 2 after none."""
    chunks = (decoding("a", 10), decoding("b", 20), prompt(3, 4), prompt(2))
    pairs = sum(5 + i for i in range(3)) + sum(1 + i for i in range(2))
    assert step_times(chunks, 0.5) == StepTimes(1, 5, pairs, 2, 11 + 21, 0.5)


def test_a_prompt_of_one_token_is_no_decoding_sequence() -> None:
    assert step_times((prompt(1),), 0.5) == StepTimes(1, 1, 1, 0, 0, 0.5)


def test_tokens_that_are_computed_again_count_as_a_prompts() -> None:
    again = ScheduledChunk("a", (7, 8), 5, 0, (0,), None)
    assert step_times((again,), 0.5).prompt_tokens == 2


def test_like_steps_are_added_up_and_told_once() -> None:
    ledger = StepLedger()
    ledger.add((decoding("a", 9),), 0.1)
    ledger.add((decoding("a", 10),), 0.2)
    ledger.add((prompt(5),), 1.0)
    assert ledger.take() == (StepTimes(2, 0, 0, 2, 21, 0.1 + 0.2), StepTimes(1, 5, 15, 0, 0, 1.0))
    assert ledger.take() == ()


def test_batches_that_differ_by_more_than_a_factor_of_two_are_told_apart() -> None:
    ledger = StepLedger()
    for size in (1, 2, 3, 4, 7):
        ledger.add([decoding(str(number), 9) for number in range(size)], 0.1)
    assert sorted(steps.decode_tokens for steps in ledger.take()) == [1, 2 + 3, 4 + 7]


def test_a_heartbeat_stays_small_whatever_steps_there_were() -> None:
    ledger = StepLedger()
    for power in range(12):
        for size in (0, 1, 2):
            decodes = [decoding(str(number), 9) for number in range(size)]
            ledger.add([*decodes, prompt(1 << power)], 0.1)
    assert len(ledger.take()) == MAX_KINDS


def test_handoffs_are_added_up_by_receiver_and_told_once() -> None:
    ledger = TransferLedger()
    ledger.add("d:1", 1000, 0.25)
    ledger.add("e:1", 10, 0.125)
    ledger.add("d:1", 500, 0.5)
    assert ledger.take() == (TransferTimes("d:1", 2, 1500, 0.75), TransferTimes("e:1", 1, 10, 0.125))
    assert ledger.take() == ()
