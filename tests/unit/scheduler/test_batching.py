"""Steps of one worker: who is computed when, who waits, and what is given back.

Blocks hold four tokens. The fake model fails when it reads KV of another sequence or position, and every
engine ends in the no-leak check.
"""

from __future__ import annotations

import pytest

from kvcache.errors import InvariantError, OverloadedError, RequestError
from scheduler.batching import MIN_PROMPT_TOKENS, PATIENCE, BatchLimits
from scheduler.request import FinishReason, RequestStatus
from tests.unit.scheduler.conftest import MakeEngine
from tests.unit.scheduler.engine import Engine, ids


def refused_field(engine: Engine, num_prompt_tokens: int, max_tokens: int, prefill_only: bool = False) -> str | None:
    with pytest.raises(RequestError) as caught:
        engine.add("refused", num_prompt_tokens, max_tokens, prefill_only=prefill_only)
    assert engine.batcher.find("refused") is None
    return caught.value.param


def crowd_out(make_engine: MakeEngine, *, prefix_caching: bool = True) -> Engine:
    """Four blocks, two sequences of one block each that want three and four: the younger is preempted."""
    engine = make_engine(num_blocks=4, prefix_caching=prefix_caching)
    engine.add("old", 4, max_tokens=13)
    engine.add("young", 4, max_tokens=8)
    return engine


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


# Preemption


def test_the_youngest_is_preempted_when_blocks_run_out(make_engine: MakeEngine) -> None:
    engine = crowd_out(make_engine)
    engine.run()
    assert engine.requests["old"].num_preemptions == 0
    assert engine.requests["young"].num_preemptions == engine.batcher.num_preemptions == 1


def test_a_sequence_does_not_join_when_the_next_block_of_another_would_preempt_it(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=3)
    engine.add("a", 4, max_tokens=4)
    engine.add("b", 8, max_tokens=1)
    assert ids(engine.step()) == ["a"]
    engine.run()
    assert engine.batcher.num_preemptions == 0
    assert engine.tokens("b") == engine.expected("b")


def test_a_preempted_sequence_gets_the_tokens_it_would_have_got(make_engine: MakeEngine) -> None:
    engine = crowd_out(make_engine)
    engine.run()
    for request_id in ("old", "young"):
        assert engine.tokens(request_id) == engine.expected(request_id)


def test_without_a_cache_a_preempted_sequence_computes_prompt_and_output_again(make_engine: MakeEngine) -> None:
    engine = crowd_out(make_engine, prefix_caching=False)
    young = engine.requests["young"]
    while not young.num_preemptions:
        engine.step()
    assert (young.status, engine.manager.block_table("young")) == (RequestStatus.WAITING, [])
    token_ids = tuple(young.token_ids)
    chunks = [chunk for plan in engine.run() for chunk in plan.chunks if chunk.request_id == "young"]
    assert len(token_ids) > young.num_prompt_tokens
    assert (chunks[0].token_ids, chunks[0].start, chunks[0].num_prompt_tokens) == (token_ids, 0, 4)


def test_the_oldest_makes_progress_in_every_step(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=8)
    for index in range(6):
        engine.add(f"r{index}", 4, max_tokens=20)
    while not engine.batcher.is_idle:
        oldest = min((each for each in engine.requests.values() if not each.finish_reason), key=lambda r: r.arrival)
        before = len(engine.tokens(oldest.request_id))
        assert oldest.request_id in ids(engine.step())
        assert len(engine.tokens(oldest.request_id)) == before + 1
    assert engine.batcher.num_preemptions > 0


def test_crowded_sequences_all_finish(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=6, max_num_batched_tokens=5)
    for index in range(8):
        engine.add(f"r{index}", 1 + index, max_tokens=16)
    engine.run(max_steps=500)
    for request_id in engine.requests:
        assert engine.tokens(request_id) == engine.expected(request_id)
    assert engine.batcher.num_preemptions > 0


def test_a_preempted_sequence_goes_before_those_that_came_later(make_engine: MakeEngine) -> None:
    engine = crowd_out(make_engine, prefix_caching=False)  # it starts again at 0
    engine.step()
    engine.add("later", 1)
    started = [
        chunk.request_id
        for plan in engine.run()
        for chunk in plan.chunks
        if chunk.start == 0 and chunk.request_id != "old"
    ]
    assert started == ["young", "later"]


def test_nobody_joins_in_a_step_that_preempts(make_engine: MakeEngine) -> None:
    engine = crowd_out(make_engine)
    while not engine.batcher.num_preemptions:
        plan = engine.step()
    assert ids(plan) == ["old"]


def test_a_preempted_sequence_can_be_aborted(make_engine: MakeEngine) -> None:
    engine = crowd_out(make_engine)
    while not engine.batcher.num_preemptions:
        engine.step()
    engine.batcher.abort("young")
    engine.run()
    assert engine.requests["young"].finish_reason is FinishReason.ABORT
    assert engine.tokens("old") == engine.expected("old")


# Handoffs, decode side


def test_a_reserved_sequence_holds_blocks_for_its_prompt_and_is_not_computed(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = engine.add("a", 9, remote_prefill=True)
    assert engine.batcher.reserve_handoffs() == [request]
    assert (request.status, len(engine.manager.block_table("a"))) == (RequestStatus.WAITING_FOR_KV, 3)
    assert engine.step() is None
    assert engine.batcher.reserve_handoffs() == []


def test_an_attached_sequence_goes_on_from_its_first_token(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", 9, max_tokens=5, remote_prefill=True)
    engine.batcher.reserve_handoffs()
    engine.attach("a")
    chunks = [chunk for plan in engine.run() for chunk in plan.chunks]
    assert [(chunk.start, chunk.num_prompt_tokens) for chunk in chunks] == [(9, 0), (10, 0), (11, 0), (12, 0)]
    assert engine.tokens("a") == engine.expected("a")


def test_a_sequence_is_attached_while_a_step_runs(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("b", 6, max_tokens=5, remote_prefill=True)
    engine.batcher.reserve_handoffs()
    engine.add("a", 6, max_tokens=5)
    engine.step(meanwhile=lambda: engine.attach("b"))
    assert ids(engine.step()) == ["b", "a"]
    engine.run()
    assert [engine.tokens(each) for each in "ab"] == [engine.expected(each) for each in "ab"]


def test_a_handoff_whose_first_token_is_the_last_ends_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = engine.add("a", 9, max_tokens=1, remote_prefill=True)
    engine.batcher.reserve_handoffs()
    engine.attach("a")
    assert (request.finish_reason, engine.outputs["a"][0].finish_reason) == (FinishReason.LENGTH, FinishReason.LENGTH)
    assert engine.manager.num_free == 32


def test_handoffs_are_reserved_in_order_while_blocks_last(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=6)
    for request_id, num_prompt_tokens in [("a", 12), ("b", 16), ("c", 16)]:
        engine.add(request_id, num_prompt_tokens, remote_prefill=True)
    assert [request.request_id for request in engine.batcher.reserve_handoffs()] == ["a"]
    engine.batcher.abort("a")
    assert [request.request_id for request in engine.batcher.reserve_handoffs()] == ["b"]


def test_a_handoff_counts_against_the_number_of_sequences(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    for request_id in "abc":
        engine.add(request_id, 4, remote_prefill=True)
    assert len(engine.batcher.reserve_handoffs()) == 2


def test_a_handoff_waits_behind_an_older_local_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("local", 4)
    engine.add("remote", 4, remote_prefill=True)
    assert engine.batcher.reserve_handoffs() == []
    engine.step()
    assert [request.request_id for request in engine.batcher.reserve_handoffs()] == ["remote"]


def test_a_sequence_that_does_not_wait_for_kv_cannot_be_attached(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("local", 4)
    engine.add("aborted", 4, remote_prefill=True)
    engine.batcher.abort("aborted")
    for request_id in ("local", "aborted", "never seen"):
        with pytest.raises(InvariantError, match="does not wait for KV"):
            engine.batcher.attach(request_id, 1)


def test_an_aborted_handoff_keeps_its_blocks_while_its_lease_is_open(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", 9, remote_prefill=True)
    engine.batcher.reserve_handoffs()
    lease = engine.manager.leases.open("transfer", "a", engine.manager.block_table("a"), now=0.0)
    engine.batcher.abort("a")
    assert engine.manager.num_free == 32 - 3
    engine.manager.leases.abort(lease)
    assert engine.manager.num_free == 32


def test_a_sequence_alone_sits_out_while_handoffs_hold_the_blocks(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=4)
    engine.add("a", 3, max_tokens=8)
    engine.step()
    engine.add("b", 8, remote_prefill=True)
    engine.batcher.reserve_handoffs()
    engine.run()
    assert (engine.batcher.num_preemptions, engine.batcher.is_idle) == (0, False)
    engine.batcher.abort("b")
    engine.run()
    assert engine.tokens("a") == engine.expected("a")


def test_a_preempted_sequence_of_a_handoff_is_computed_here(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=4)
    engine.add("old", 4, max_tokens=13)
    engine.step()
    engine.add("young", 4, max_tokens=8, remote_prefill=True)
    engine.batcher.reserve_handoffs()
    engine.attach("young")
    engine.run()
    assert engine.requests["young"].num_preemptions == 1
    assert engine.tokens("young") == engine.expected("young")


# Handoffs, prefill side


def test_a_prefilled_sequence_keeps_its_blocks_until_the_handoff_is_complete(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = engine.add("a", 9, max_tokens=5, prefill_only=True)
    engine.run()
    assert (request.status, engine.tokens("a")) == (RequestStatus.HANDING_OVER, engine.expected("a")[:1])
    assert engine.manager.num_free == 32 - 3
    engine.batcher.complete_handoff("a")
    assert (request.status, request.finish_reason, engine.manager.num_free) == (
        RequestStatus.FINISHED,
        FinishReason.STOP,
        32,
    )


def test_a_first_token_that_ends_the_sequence_is_handed_over_all_the_same(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = engine.add("a", 4, max_tokens=1, prefill_only=True)
    engine.run()
    assert request.status is RequestStatus.HANDING_OVER


@pytest.mark.parametrize(("num_prompt_tokens", "num_blocks"), [(1, 1), (4, 1), (5, 2), (8, 2)])
def test_the_lease_of_a_handoff_covers_the_prompt(
    make_engine: MakeEngine, num_prompt_tokens: int, num_blocks: int
) -> None:
    engine = make_engine()
    engine.add("a", num_prompt_tokens, prefill_only=True)
    engine.run()
    lease = engine.batcher.lease_for_handoff("a", "transfer", now=0.0)
    assert list(lease.block_ids) == engine.manager.block_table("a")[:num_blocks]
    assert len(lease.block_ids) == num_blocks
    engine.manager.leases.abort(lease)


def test_an_abort_while_sending_leaves_the_blocks_to_the_lease(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", 9, prefill_only=True)
    engine.run()
    lease = engine.batcher.lease_for_handoff("a", "transfer", now=0.0)
    engine.batcher.abort("a")
    assert engine.manager.num_free == 32 - 3
    engine.manager.leases.abort(lease)
    assert engine.manager.num_free == 32


def test_blocks_of_a_handoff_are_not_used_for_other_prompts(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=4)
    engine.add("a", 9, prefill_only=True)
    engine.run()
    engine.add("b", 8, prefill_only=True)
    assert engine.step() is None
    engine.batcher.complete_handoff("a")
    assert ids(engine.step()) == ["b"]


def test_a_prompt_that_is_being_handed_over_is_never_preempted(make_engine: MakeEngine) -> None:
    """Its blocks are read while it is computed; the decoding sequence waits for them instead."""
    engine = make_engine(num_blocks=5, max_num_batched_tokens=4)
    decoding = engine.add("old", 4, max_tokens=9)
    engine.step()
    prompt = engine.add("young", 12, prefill_only=True)
    while prompt.status is not RequestStatus.HANDING_OVER:
        assert engine.step() is not None
    assert engine.batcher.num_preemptions == 0
    engine.batcher.complete_handoff("young")
    engine.run()
    assert decoding.num_output_tokens == 9
