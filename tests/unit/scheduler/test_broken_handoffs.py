"""Handoffs that break half-way: what was verified is kept, and what is left is computed here or sent by another."""

from __future__ import annotations

import pytest

from kvcache.errors import InvariantError
from scheduler.request import RequestStatus
from tests.unit.scheduler.conftest import MakeEngine
from tests.unit.scheduler.engine import Engine

PROMPT_TOKENS = 22  # five blocks of four and two tokens


def reserved(engine: Engine, request_id: str = "a", num_prompt_tokens: int = PROMPT_TOKENS) -> None:
    engine.add(request_id, num_prompt_tokens, remote_prefill=True)
    engine.batcher.reserve_handoffs()


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize(("num_tokens", "start"), [(8, 8), (11, 8), (20, 20), (22, 20)])
def test_a_small_rest_is_computed_here_from_the_first_block_that_is_not_whole(
    make_engine: MakeEngine, num_tokens: int, start: int, prefix_caching: bool
) -> None:
    engine = make_engine(prefix_caching=prefix_caching)
    reserved(engine)
    assert engine.break_handoff("a", num_tokens)
    first, *_ = engine.run()
    assert [chunk.start for chunk in first.chunks] == [start]
    assert engine.tokens("a") == engine.expected("a")
    assert engine.batcher.num_resumed_blocks == start // 4


@pytest.mark.parametrize("num_tokens", [16, 12])
def test_the_last_token_is_computed_even_when_all_had_come(make_engine: MakeEngine, num_tokens: int) -> None:
    engine = make_engine()
    reserved(engine, num_prompt_tokens=num_tokens)
    assert engine.break_handoff("a", num_tokens)
    first, *_ = engine.run()
    assert [chunk.start for chunk in first.chunks] == [num_tokens - 4]
    assert engine.tokens("a") == engine.expected("a")


def test_a_rest_beyond_one_step_is_left_to_another_placement_which_finds_what_is_here(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    reserved(engine)
    assert not engine.break_handoff("a", 9)
    engine.batcher.abort("a")
    reserved(engine, "other a")
    assert engine.requests["other a"].num_computed_tokens == 8
    engine.attach("other a")
    engine.run()
    assert engine.tokens("other a") == engine.expected("a")


def test_without_a_prefix_cache_another_placement_begins_anew(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=8, prefix_caching=False)
    reserved(engine)
    assert not engine.break_handoff("a", 9)
    assert engine.batcher.num_resumed_blocks == 0
    engine.batcher.abort("a")
    reserved(engine, "other a")
    assert engine.requests["other a"].num_computed_tokens == 0


def test_half_a_block_is_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    reserved(engine)
    assert not engine.break_handoff("a", 3)
    assert engine.batcher.num_resumed_blocks == 0
    assert len(engine.manager.pool.prefixes) == 0


def test_what_was_cached_before_is_not_counted_as_kept(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("first a", PROMPT_TOKENS)
    engine.run()
    reserved(engine)
    assert engine.requests["a"].num_computed_tokens == 20
    assert not engine.break_handoff("a", 20)
    assert engine.batcher.num_resumed_blocks == 0


def test_only_a_sequence_that_waits_for_kv_can_keep_any(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", PROMPT_TOKENS)
    for request_id in ("a", "unknown"):
        with pytest.raises(InvariantError, match="does not wait for KV"):
            engine.batcher.keep_received(request_id, 8)
    assert engine.requests["a"].status is RequestStatus.WAITING
