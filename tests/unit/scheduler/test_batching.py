"""Steps of one worker: who is computed when, who waits, and what is given back.

Blocks hold four tokens. The fake model fails when it reads KV of another sequence or position, and every
engine ends in the no-leak check.
"""

from __future__ import annotations

import pytest

from kvcache.errors import InvariantError, OverloadedError, RequestError
from scheduler.request import FinishReason, RequestStatus
from tests.unit.scheduler.conftest import MakeEngine
from tests.unit.scheduler.engine import Engine, ids


def refused_field(engine: Engine, num_prompt_tokens: int, max_tokens: int, prefill_only: bool = False) -> str | None:
    with pytest.raises(RequestError) as caught:
        engine.add("refused", num_prompt_tokens, max_tokens, prefill_only=prefill_only)
    assert engine.batcher.find("refused") is None
    return caught.value.param


# Joining and leaving


def test_every_sequence_gets_its_reference_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=7)
    for index, num_prompt_tokens in enumerate([1, 4, 5, 9, 17]):
        engine.add(f"r{index}", num_prompt_tokens, max_tokens=index + 2)
    engine.run()
    for request_id in engine.requests:
        assert engine.tokens(request_id) == engine.expected(request_id)
    assert engine.batcher.is_idle


@pytest.mark.parametrize("steps_before", [1, 2, 3, 4])
def test_a_sequence_joins_the_running_batch_at_the_next_step(make_engine: MakeEngine, steps_before: int) -> None:
    engine = make_engine()
    engine.add("a", 5, max_tokens=9)
    for _ in range(steps_before):
        engine.step()
    engine.add("b", 5)
    assert ids(engine.step()) == ["a", "b"]


def test_a_finished_sequence_leaves_its_place_to_the_next_step(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add("a", 4, max_tokens=2)
    engine.add("b", 4, max_tokens=2)
    assert [ids(plan) for plan in engine.run()] == [["a"], ["a"], ["b"], ["b"]]


def test_a_sequence_ends_at_its_stop_token(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("without-a", 4, max_tokens=6)
    third = engine.expected("without-a")[2]
    engine.add("a", 4, max_tokens=6, stop_token_ids=(third,))  # the same prompt
    engine.run()
    assert engine.tokens("a") == engine.tokens("without-a")[:3]
    assert engine.outputs["a"][-1].finish_reason is FinishReason.STOP


def test_only_the_last_token_has_a_finish_reason(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = engine.add("a", 4, max_tokens=3)
    engine.run()
    assert [output.finish_reason for output in engine.outputs["a"]] == [None, None, FinishReason.LENGTH]
    assert (request.status, request.finish_reason) == (RequestStatus.FINISHED, FinishReason.LENGTH)


def test_no_more_sequences_than_allowed_hold_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=3)
    for index in range(7):
        engine.add(f"r{index}", 4)
    assert len(ids(engine.step())) == 3
    assert (engine.batcher.num_running, engine.batcher.num_waiting) == (3, 4)


def test_prompts_of_one_length_start_in_the_order_of_their_arrival(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    for index in range(6):
        engine.add(f"r{index}", 3, max_tokens=2)
    started: list[str] = []
    for plan in engine.run():
        started += [chunk.request_id for chunk in plan.chunks if chunk.start == 0]
    assert started == [f"r{index}" for index in range(6)]


def test_nothing_to_do_is_no_plan(make_engine: MakeEngine) -> None:
    assert make_engine().batcher.plan() is None


def test_a_second_plan_before_apply_is_a_bug(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", 4)

    def plan_again() -> None:
        with pytest.raises(InvariantError, match="without apply"):
            engine.batcher.plan()

    assert engine.step(meanwhile=plan_again) is not None


# The token budget


def test_decoding_sequences_come_first(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.add("prompt", 20)
    engine.step()
    engine.add("a", 2, max_tokens=9)
    for _ in range(2):
        engine.step()
    engine.add("late", 20)
    plan = engine.step()
    assert plan is not None
    sizes = [len(chunk.token_ids) for chunk in plan.chunks]
    assert ids(plan)[-1] == "late"
    assert sizes == [1, 1, 6]


def test_prompts_share_what_the_decoding_sequences_leave_of_the_budget(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=6)
    engine.add("a", 2, max_tokens=9)
    engine.add("b", 2, max_tokens=9)
    engine.step()
    engine.add("c", 10)
    engine.add("d", 10)
    plans = [engine.step() for _ in range(3)]
    sizes = [{chunk.request_id: len(chunk.token_ids) for chunk in plan.chunks} for plan in plans if plan]
    assert sizes == [{"a": 1, "b": 1, "c": 4}, {"a": 1, "b": 1, "c": 4}, {"a": 1, "b": 1, "c": 2, "d": 2}]


@pytest.mark.parametrize("max_num_batched_tokens", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 4, 7, 16, 17])
def test_chunks_cover_each_prompt_token_once(
    make_engine: MakeEngine, num_prompt_tokens: int, max_num_batched_tokens: int
) -> None:
    engine = make_engine(max_num_batched_tokens=max_num_batched_tokens)
    request = engine.add("a", num_prompt_tokens, max_tokens=1)
    chunks = [chunk for plan in engine.run() for chunk in plan.chunks]
    covered = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
    assert covered == list(range(num_prompt_tokens))
    assert sum((chunk.token_ids for chunk in chunks), ()) == request.prompt_token_ids
    assert sum(chunk.num_prompt_tokens for chunk in chunks) == num_prompt_tokens
    assert [chunk.sampling is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_budget_below_the_number_of_sequences_serves_the_oldest(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=2)
    for request_id in "abc":
        engine.add(request_id, 1, max_tokens=3)
    plans = engine.run()
    assert [ids(plan) for plan in plans] == [["a", "b"], ["a", "b"], ["a", "b"], ["c"], ["c"], ["c"]]


# Refusals


def test_a_sequence_may_fill_the_whole_cache(make_engine: MakeEngine) -> None:
    """Sixteen tokens of KV: the seventeenth token is sampled and never computed."""
    engine = make_engine(num_blocks=4)
    engine.add("a", 5, max_tokens=12)
    engine.run()
    assert engine.tokens("a") == engine.expected("a")


def test_a_sequence_that_could_never_fit_is_refused(make_engine: MakeEngine) -> None:
    assert refused_field(make_engine(num_blocks=4), 5, max_tokens=13) == "max_tokens"


def test_a_prompt_to_hand_over_needs_room_for_itself_only(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=4)
    engine.add("a", 16, max_tokens=100, prefill_only=True)
    assert ids(engine.step()) == ["a"]
    assert refused_field(engine, 17, max_tokens=1, prefill_only=True) == "max_tokens"


def test_an_empty_prompt_is_refused(make_engine: MakeEngine) -> None:
    assert refused_field(make_engine(), 0, max_tokens=1) == "prompt"


def test_an_id_in_use_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = engine.add("a", 4)
    with pytest.raises(RequestError) as caught:
        engine.add("a", 5)
    assert caught.value.param == "request_id"
    assert engine.batcher.find("a") is request


def test_a_full_queue_pushes_back(make_engine: MakeEngine) -> None:
    engine = make_engine(waiting=2)
    engine.add("a", 4)
    engine.add("b", 4)
    with pytest.raises(OverloadedError):
        engine.add("c", 4)
    assert engine.batcher.find("c") is None
    engine.step()
    engine.add("c", 4)
    engine.run()
    assert engine.tokens("c") == engine.expected("c")


# Aborts and failures


def test_an_aborted_waiting_sequence_is_never_computed(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = engine.add("a", 4)
    engine.batcher.abort("a")
    assert engine.step() is None
    assert (request.status, request.finish_reason) == (RequestStatus.FINISHED, FinishReason.ABORT)


@pytest.mark.parametrize("steps_before", [1, 2, 3])
def test_an_aborted_running_sequence_gives_its_blocks_back_at_once(make_engine: MakeEngine, steps_before: int) -> None:
    """In the middle of its prompt, at its first token, and later."""
    engine = make_engine(max_num_batched_tokens=4)
    engine.add("a", 8, max_tokens=9)
    for _ in range(steps_before):
        engine.step()
    engine.batcher.abort("a")
    assert (engine.manager.num_free, engine.step()) == (32, None)


def test_an_abort_during_a_step_keeps_the_blocks_until_apply(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = engine.add("a", 8)
    engine.add("b", 8)

    def abort_twice() -> None:
        for _ in range(2):
            engine.batcher.abort("a")
        assert engine.manager.num_free == 32 - 4
        assert request.status is RequestStatus.RUNNING

    engine.step(meanwhile=abort_twice)
    assert engine.manager.num_free == 32 - 2
    assert (request.finish_reason, engine.tokens("a")) == (FinishReason.ABORT, [])
    engine.run()
    assert engine.tokens("b") == engine.expected("b")


def test_an_abort_during_a_step_of_others_is_done_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add("a", 4)
    waiting = engine.add("b", 4)
    engine.step(meanwhile=lambda: engine.batcher.abort("b"))
    assert waiting.status is RequestStatus.FINISHED


def test_aborting_what_has_ended_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = engine.add("a", 4, max_tokens=1)
    engine.run()
    engine.batcher.abort("a")
    engine.batcher.abort("never seen")
    assert request.finish_reason is FinishReason.LENGTH


def test_the_id_of_a_sequence_aborted_during_a_step_can_be_used_again(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", 8)
    engine.step(meanwhile=lambda: engine.batcher.abort("a"))
    engine.add("a", 3)
    engine.run()
    assert engine.tokens("a") == engine.expected("a")


@pytest.mark.parametrize("steps_before", [0, 1, 2])
def test_a_failed_sequence_ends_alone(make_engine: MakeEngine, steps_before: int) -> None:
    engine = make_engine()
    for request_id in ("a", "poison", "c"):
        engine.add(request_id, 6, max_tokens=5)
    for _ in range(steps_before):
        engine.step()
    engine.step(failed={"poison"})
    assert engine.batcher.find("poison") is None
    assert (engine.requests["poison"].finish_reason, len(engine.tokens("poison"))) == (FinishReason.ABORT, steps_before)
    engine.run()
    assert engine.tokens("a") == engine.expected("a")
    assert engine.tokens("c") == engine.expected("c")
