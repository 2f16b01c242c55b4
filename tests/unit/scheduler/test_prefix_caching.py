"""Prompts that begin alike: what is computed once, who may share it, and what never is shared.

Blocks hold four tokens. The fake model fails when it reads KV of another context, and the engine when a step
writes to a block that somebody else reads or may come to read.
"""

from __future__ import annotations

import pytest

from kvcache.errors import InvariantError
from scheduler.request import FinishReason, RequestStatus
from tests.unit.scheduler.conftest import MakeEngine
from tests.unit.scheduler.engine import Engine, ids

TEXT = tuple(range(40))


def run_first(engine: Engine, num_tokens: int = 12, cache_salt: bytes = b"") -> None:
    """A sequence that leaves its blocks behind, cached."""
    engine.add("first", max_tokens=1, prompt=TEXT[:num_tokens], cache_salt=cache_salt)
    engine.run()


def starts(engine: Engine, request_id: str) -> list[int]:
    """Runs to the end; where each chunk of one sequence began."""
    return [chunk.start for plan in engine.run() for chunk in plan.chunks if chunk.request_id == request_id]


def check_all(engine: Engine) -> None:
    for request_id in engine.requests:
        assert engine.tokens(request_id) == engine.expected(request_id)


# Hits


@pytest.mark.parametrize(
    ("num_tokens", "start"),
    [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (20, 12)],
)
def test_a_prompt_is_computed_from_where_the_cached_blocks_end_and_its_last_token_always(
    make_engine: MakeEngine, num_tokens: int, start: int
) -> None:
    engine = make_engine()
    run_first(engine)
    request = engine.add("second", max_tokens=3, prompt=TEXT[:num_tokens])
    assert starts(engine, "second")[0] == start
    assert request.num_cached_tokens == start
    check_all(engine)


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_chunks_begin_in_the_middle_of_a_prompt(make_engine: MakeEngine, budget: int) -> None:
    engine = make_engine(max_num_batched_tokens=budget)
    run_first(engine)
    engine.add("second", max_tokens=1, prompt=TEXT[:21])
    chunks = [chunk for plan in engine.run() for chunk in plan.chunks]
    assert [position for chunk in chunks for position in range(chunk.start, chunk.end)] == list(range(12, 21))
    assert sum(chunk.num_prompt_tokens for chunk in chunks) == 9
    check_all(engine)


def test_a_prompt_that_differs_within_a_block_shares_the_blocks_before(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run_first(engine)
    engine.add("second", prompt=(*TEXT[:6], 49, *TEXT[7:14]))
    assert starts(engine, "second")[0] == 4
    check_all(engine)


def test_the_next_turn_of_a_conversation_finds_the_answer_cached(make_engine: MakeEngine) -> None:
    engine = make_engine()
    first = engine.add("first", max_tokens=10, prompt=TEXT[:6])
    engine.run()
    engine.add("second", prompt=(*first.token_ids, 1, 2, 3))
    assert starts(engine, "second")[0] == 12  # 6 + 10 tokens, of which the last was never computed
    check_all(engine)


def test_choices_of_one_prompt_share_it_once_the_first_is_computed(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=9)
    for request_id in "abc":
        engine.add(request_id, prompt=TEXT[:9])
    plans = engine.run()
    assert ids(plans[0]) == ["a"]
    assert sum(chunk.num_prompt_tokens for plan in plans for chunk in plan.chunks) == 9 + 1 + 1
    check_all(engine)


def test_prompts_of_one_step_are_not_shared_before_it_is_over(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for request_id in "ab":
        engine.add(request_id, prompt=TEXT[:9])
    plan = engine.step()
    assert plan is not None
    assert [chunk.start for chunk in plan.chunks] == [0, 0]
    assert set(plan.chunks[0].block_table).isdisjoint(plan.chunks[1].block_table)
    engine.run()
    check_all(engine)


def test_sequences_that_share_a_prefix_go_their_own_ways_after_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run_first(engine)
    for request_id, token_id in [("a", 7), ("b", 8), ("c", 9)]:
        engine.add(request_id, max_tokens=6, prompt=(*TEXT[:12], token_id))
    plan = engine.step()
    assert plan is not None
    assert len({chunk.block_table[:3] for chunk in plan.chunks}) == 1
    engine.run()
    check_all(engine)


def test_tokens_looked_up_and_found_are_counted_once_per_sequence(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=4)
    engine.add("old", 4, max_tokens=13)
    engine.add("young", 4, max_tokens=8)
    engine.run()
    assert engine.batcher.num_preemptions > 0
    assert (engine.batcher.prefix_cache_queries, engine.batcher.prefix_cache_hits) == (8, 0)
    engine.add("again", prompt=(*engine.requests["young"].prompt_token_ids, 1))
    engine.run()
    assert (engine.batcher.prefix_cache_queries, engine.batcher.prefix_cache_hits) == (13, 4)


# What is not shared


def test_different_salts_never_share(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run_first(engine, cache_salt=b"one")
    engine.add("other", prompt=TEXT[:12], cache_salt=b"another")
    engine.add("none", prompt=TEXT[:12])
    engine.add("same", prompt=TEXT[:12], cache_salt=b"one")
    engine.run()
    assert [engine.requests[each].num_cached_tokens for each in ("other", "none", "same")] == [0, 0, 8]


def test_without_the_prefix_cache_everything_is_computed(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_caching=False)
    run_first(engine)
    engine.add("second", prompt=TEXT[:13])
    assert starts(engine, "second")[0] == 0
    assert engine.batcher.prefix_cache_hits == 0


@pytest.mark.parametrize("failing_step", [0, 1, 2])
def test_no_block_of_a_failed_sequence_is_shared(make_engine: MakeEngine, failing_step: int) -> None:
    """Not even those of the steps that seemed to go well: what spoilt it may have begun there."""
    engine = make_engine(max_num_batched_tokens=4)
    engine.add("failed", prompt=TEXT[:12])
    for _ in range(failing_step):
        engine.step()
    engine.step(failed={"failed"})
    engine.add("second", prompt=TEXT[:13])
    assert starts(engine, "second")[0] == 0
    assert engine.tokens("second") == engine.expected("second")


def test_a_failure_does_not_disturb_those_who_share_its_prefix(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run_first(engine)
    engine.add("failed", prompt=(*TEXT[:12], 5), max_tokens=5)
    engine.add("good", prompt=(*TEXT[:12], 6), max_tokens=5)
    engine.step()
    engine.step(failed={"failed"})
    engine.run()
    assert engine.tokens("good") == engine.expected("good")


def test_what_an_aborted_sequence_has_computed_is_shared(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.add("aborted", prompt=TEXT[:30])
    engine.step()
    engine.batcher.abort("aborted")
    engine.add("second", prompt=TEXT[:30])
    assert starts(engine, "second")[0] == 8
    assert engine.tokens("second") == engine.expected("second")


def test_the_step_in_which_a_sequence_was_aborted_counts(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.add("aborted", prompt=TEXT[:30])
    engine.step(meanwhile=lambda: engine.batcher.abort("aborted"))
    engine.add("second", prompt=TEXT[:30])
    assert starts(engine, "second")[0] == 8


# Room


def test_a_cached_block_that_is_free_is_room_for_one_only(make_engine: MakeEngine) -> None:
    """Three free cached blocks and one more free one: the prefix and a new block are all of it."""
    engine = make_engine(num_blocks=5)
    run_first(engine)
    engine.add("running", 3, max_tokens=2)
    engine.step()
    engine.add("second", prompt=TEXT[:14], max_tokens=1)
    assert engine.manager.num_free == 4
    assert ids(engine.step()) == ["running"]  # with the room that it may grow into, one too few
    assert starts(engine, "second") == [12]


def test_a_prefix_that_others_hold_needs_no_room(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=6)
    run_first(engine)
    engine.add("a", prompt=TEXT[:13], max_tokens=4)
    engine.step()
    assert engine.manager.num_free == 2
    engine.add("b", prompt=(*TEXT[:12], 9), max_tokens=4)  # four blocks
    assert ids(engine.step()) == ["a", "b"]
    engine.run()
    check_all(engine)


def test_an_old_prefix_makes_room_for_new_work(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=4)
    run_first(engine)
    engine.add("big", 9, max_tokens=8)
    engine.run()
    engine.add("second", prompt=TEXT[:13], max_tokens=1)
    assert starts(engine, "second") == [0]
    check_all(engine)


# Preemption


def test_a_preempted_sequence_finds_what_it_had_computed(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=8)
    engine.add("old", 4, max_tokens=25)
    young = engine.add("young", 10, max_tokens=12)
    while not young.num_preemptions:
        engine.step()
    num_full_blocks = (len(young.token_ids) - 1) // 4
    assert num_full_blocks > 2
    assert starts(engine, "young")[0] > 0
    check_all(engine)


def test_a_sequence_preempted_in_its_prompt_has_computed_it_itself(make_engine: MakeEngine) -> None:
    """What it finds afterwards is its own work and no cached token to its client."""
    engine = make_engine(num_blocks=8, max_num_batched_tokens=3)
    engine.add("old", 3, max_tokens=18)
    for _ in range(3):
        engine.step()
    young = engine.add("young", max_tokens=2, prompt=TEXT[:20])
    while not young.num_preemptions:
        engine.step()
    assert (young.num_output_tokens, young.num_computed_tokens) == (0, 0)
    assert starts(engine, "young")[0] > 0
    assert young.num_cached_tokens == 0
    check_all(engine)


@pytest.mark.parametrize("num_shared", [0, 8])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_demand_of_many_times_the_cache_is_served_in_order(
    make_engine: MakeEngine, num_shared: int, prefix_caching: bool
) -> None:
    """Sixteen sequences of seven blocks each in nine blocks: no livelock, and equals end as they came."""
    engine = make_engine(num_blocks=9, max_num_seqs=8, max_num_batched_tokens=12, prefix_caching=prefix_caching)
    for index in range(16):
        own = [(3 * index + each) % 50 for each in range(12 - num_shared)]
        engine.add(f"r{index}", max_tokens=16, prompt=(*TEXT[:num_shared], *own))
    ended: list[str] = []
    while not engine.batcher.is_idle:
        oldest = min((each for each in engine.requests.values() if not each.finish_reason), key=lambda r: r.arrival)
        before = oldest.num_computed_tokens
        assert oldest.request_id in ids(engine.step())
        assert oldest.num_computed_tokens > before
        ended += [each for each, request in engine.requests.items() if request.finish_reason and each not in ended]
    assert ended == [f"r{index}" for index in range(16)]
    assert engine.batcher.num_preemptions > 0
    check_all(engine)


# Handoffs


def test_a_decode_worker_reserves_only_the_blocks_that_it_lacks(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run_first(engine)
    request = engine.add("second", prompt=TEXT[:18], remote_prefill=True)
    engine.batcher.reserve_handoffs()
    assert (request.num_computed_tokens, engine.manager.num_free) == (12, 32 - 5)
    lease = engine.batcher.lease_for_arrival("second", "transfer", now=0.0)
    assert lease.first_block == 3
    assert list(lease.block_ids) == engine.manager.block_table("second")[3:]
    engine.manager.leases.abort(lease)
    engine.attach("second")
    engine.run()
    check_all(engine)


def test_when_all_of_a_prompt_is_cached_its_last_block_is_sent_all_the_same(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run_first(engine)
    engine.add("second", prompt=TEXT[:12], remote_prefill=True)
    engine.batcher.reserve_handoffs()
    lease = engine.batcher.lease_for_arrival("second", "transfer", now=0.0)
    assert (lease.first_block, len(lease.block_ids)) == (2, 1)
    engine.manager.leases.abort(lease)
    engine.attach("second")
    engine.run()
    check_all(engine)


def test_a_prompt_that_was_handed_over_is_cached_on_the_decode_worker(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("first", prompt=TEXT[:9], remote_prefill=True)
    engine.batcher.reserve_handoffs()
    engine.add("too soon", prompt=TEXT[:9], remote_prefill=True)
    (too_soon,) = engine.batcher.reserve_handoffs()
    assert too_soon.num_computed_tokens == 0
    engine.attach("first")
    engine.add("second", prompt=TEXT[:9], remote_prefill=True)
    (second,) = engine.batcher.reserve_handoffs()
    assert second.num_computed_tokens == 8
    engine.attach("too soon")
    engine.attach("second")
    engine.run()
    check_all(engine)


def test_a_handoff_that_was_not_committed_caches_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("aborted", prompt=TEXT[:9], remote_prefill=True)
    engine.batcher.reserve_handoffs()
    engine.runner.write(engine.manager.block_table("aborted"), 0, TEXT[:5])
    engine.batcher.abort("aborted")
    assert len(engine.manager.pool.prefixes) == 0


def test_blocks_to_be_written_by_a_handoff_must_be_nobody_else_s(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", prompt=TEXT[:9], remote_prefill=True)
    engine.batcher.reserve_handoffs()
    lease = engine.manager.leases.open("other", "other", engine.manager.block_table("a")[2:], now=0.0)
    with pytest.raises(InvariantError, match="may not be written"):
        engine.batcher.lease_for_arrival("a", "transfer", now=0.0)
    engine.manager.leases.abort(lease)


def test_what_the_prefill_worker_found_cached_is_what_the_client_is_told(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run_first(engine)
    request = engine.add("second", prompt=TEXT[:18], remote_prefill=True)
    engine.batcher.reserve_handoffs()
    engine.batcher.attach("second", first_token_id=1, num_cached_tokens=16)
    assert request.num_cached_tokens == 16


def test_the_lease_of_a_sender_covers_what_the_other_side_lacks(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", prompt=TEXT[:18], prefill_only=True)
    engine.run()
    lease = engine.batcher.lease_for_handoff("a", "transfer", now=0.0, first_block=3)
    assert (lease.first_block, list(lease.block_ids)) == (3, engine.manager.block_table("a")[3:5])
    engine.manager.leases.abort(lease)


def test_a_prefill_worker_computes_the_end_of_a_cached_prompt_and_holds_all_of_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run_first(engine)
    request = engine.add("second", prompt=TEXT[:14], prefill_only=True)
    assert starts(engine, "second") == [12]
    assert (request.status, len(engine.manager.block_table("second"))) == (RequestStatus.HANDING_OVER, 4)
    engine.batcher.complete_handoff("second")
    assert request.finish_reason is FinishReason.STOP
