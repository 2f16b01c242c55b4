"""Handoffs as a batcher sees them: who waits for KV, and who holds blocks for it.

Blocks hold four tokens; see ``test_batching.py``.
"""

from __future__ import annotations

import pytest

from kvcache.errors import InvariantError
from scheduler.request import FinishReason, RequestStatus
from tests.unit.scheduler.conftest import MakeEngine
from tests.unit.scheduler.engine import ids

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


def test_a_handoff_is_reserved_while_a_step_runs(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", 6, max_tokens=5)

    def arrive() -> None:
        request = engine.add("b", 6, max_tokens=5, remote_prefill=True)
        assert engine.batcher.reserve_handoffs() == [request]

    engine.step(meanwhile=arrive)
    engine.attach("b")
    engine.run()
    assert [engine.tokens(each) for each in "ab"] == [engine.expected(each) for each in "ab"]


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
