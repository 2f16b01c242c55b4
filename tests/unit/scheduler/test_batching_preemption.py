"""Blocks run out: who gives way, and that everybody gets there all the same.

Blocks hold four tokens; see ``test_batching.py``.
"""

from __future__ import annotations

from scheduler.request import FinishReason, RequestStatus
from tests.unit.scheduler.conftest import MakeEngine
from tests.unit.scheduler.engine import Engine, ids


def crowd_out(make_engine: MakeEngine, *, prefix_caching: bool = True) -> Engine:
    """Four blocks, two sequences of one block each that want three and four: the younger is preempted."""
    engine = make_engine(num_blocks=4, prefix_caching=prefix_caching)
    engine.add("old", 4, max_tokens=13)
    engine.add("young", 4, max_tokens=8)
    return engine


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
