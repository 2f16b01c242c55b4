"""Who joins first and who is preempted, by class, priority and arrival, on one worker."""

from __future__ import annotations

from scheduler.request import RequestStatus
from scheduler.urgency import ServiceClass, Urgency
from tests.unit.scheduler.conftest import MakeEngine
from tests.unit.scheduler.engine import BATCH, INTERACTIVE, Engine, ids

URGENT = Urgency(priority=-5)
PATIENT = Urgency(priority=5)
URGENT_BATCH = Urgency(ServiceClass.BATCH, priority=-5)


def check_outputs(engine: Engine) -> None:
    """Everything that was added gets its tokens."""
    engine.run()
    for request_id in engine.requests:
        assert engine.tokens(request_id) == engine.expected(request_id)


def test_sequences_join_by_class_then_priority_then_arrival(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    for name, urgency in (
        ("batch", BATCH),
        ("urgent batch", URGENT_BATCH),
        ("patient", PATIENT),
        ("first", INTERACTIVE),
        ("second", INTERACTIVE),
        ("urgent", URGENT),
    ):
        engine.add(name, 4, max_tokens=1, urgency=urgency)
    order = [name for plan in engine.run() for name in ids(plan)]
    assert order == ["urgent", "first", "second", "patient", "urgent batch", "batch"]


def test_an_interactive_prompt_takes_the_budget_of_a_batch_prompt_under_way(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.add("batch", 40, urgency=BATCH)
    assert ids(engine.step()) == ["batch"]
    engine.add("chat", 8, max_tokens=1)
    assert ids(engine.step()) == ["chat"]
    assert ids(engine.step()) == ["batch"]
    check_outputs(engine)


def test_batch_sequences_give_their_places_to_interactive_ones_last_first(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    engine.add("batch a", 4, 8, urgency=BATCH)
    engine.add("batch b", 4, 8, urgency=BATCH)
    engine.step()
    engine.add("chat", 4, 8)
    assert set(ids(engine.step())) == {"batch a", "chat"}
    assert engine.requests["batch b"].status is RequestStatus.WAITING
    check_outputs(engine)


def test_batch_sequences_give_their_blocks_to_an_interactive_handoff(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=8)
    engine.add("batch", 20, 8, urgency=BATCH)
    engine.step()
    engine.add("chat", 16, 4, remote_prefill=True)
    assert [request.request_id for request in engine.batcher.reserve_handoffs()] == ["chat"]
    assert engine.requests["batch"].num_preemptions == 1
    engine.attach("chat")
    check_outputs(engine)


def test_a_step_that_runs_loses_no_sequence_to_an_interactive_handoff(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=8)
    engine.add("batch", 20, 8, urgency=BATCH)
    engine.step()

    def arrive() -> None:
        engine.add("chat", 16, 4, remote_prefill=True)
        assert engine.batcher.reserve_handoffs() == []

    engine.step(meanwhile=arrive)
    assert engine.requests["batch"].num_preemptions == 0
    assert [request.request_id for request in engine.batcher.reserve_handoffs()] == ["chat"]
    assert engine.requests["batch"].num_preemptions == 1
    engine.attach("chat")
    check_outputs(engine)


def test_no_batch_sequence_is_preempted_when_that_would_not_help(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=8)
    engine.add("chat a", 12, 12)
    engine.add("batch", 4, 8, urgency=BATCH)
    engine.step()
    engine.add("chat b", 24, 4)
    engine.step()
    assert engine.requests["batch"].num_preemptions == 0
    assert engine.requests["chat b"].status is RequestStatus.WAITING
    check_outputs(engine)


def test_blocks_shared_with_an_interactive_sequence_are_not_counted_as_given_back(make_engine: MakeEngine) -> None:
    """The batch sequence holds five blocks; four of them it shares."""
    engine = make_engine(num_blocks=12)
    prompt = list(range(17))
    engine.add("chat", prompt=prompt, max_tokens=12)
    engine.step()
    engine.add("batch", prompt=prompt, max_tokens=6, urgency=BATCH)
    engine.step()
    assert engine.requests["batch"].num_cached_tokens == 16
    engine.add("other", 28, 2)
    engine.step()
    assert engine.requests["batch"].num_preemptions == 0
    check_outputs(engine)


def test_an_interactive_sequence_never_waits_for_a_batch_one_to_end(make_engine: MakeEngine) -> None:
    """A flood of batch work beside a chat that arrives late: the chat is in the very next step, to its end."""
    engine = make_engine(num_blocks=16, max_num_seqs=4)
    for index in range(12):
        engine.add(f"batch {index}", 8, 10, urgency=BATCH)
    for _ in range(3):
        engine.step()
    engine.add("chat", 8, 10)
    for _ in range(10):
        assert "chat" in ids(engine.step())
    assert engine.requests["chat"].status is RequestStatus.FINISHED
    check_outputs(engine)


def test_running_sequences_of_low_priority_are_preempted_for_growing_ones_first(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=6)
    engine.add("patient", 8, 12, urgency=PATIENT)
    engine.add("urgent", 8, 12, urgency=URGENT)
    check_outputs(engine)
    assert engine.requests["patient"].num_preemptions >= 1
    assert engine.requests["urgent"].num_preemptions == 0


def test_batch_work_ends_though_interactive_sequences_keep_coming(make_engine: MakeEngine) -> None:
    """No livelock: whenever interactive work leaves room, batch sequences get further."""
    engine = make_engine(num_blocks=8, max_num_seqs=2)
    engine.add("batch a", 8, 12, urgency=BATCH)
    engine.add("batch b", 8, 12, urgency=BATCH)
    for number in range(200):
        if number % 8 == 0 and number < 160:
            engine.add(f"chat {number}", 8, 3)
        if engine.step() is None:
            break
    assert engine.batcher.is_idle
    check_outputs(engine)
