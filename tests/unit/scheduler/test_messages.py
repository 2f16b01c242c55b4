"""What crosses processes comes out of a pickle as it went in."""

from __future__ import annotations

import pickle
from dataclasses import fields, is_dataclass
from typing import get_args

import pytest

from scheduler import events, types
from scheduler.events import (
    BeatEvery,
    PlaceRequest,
    PrefillDone,
    RefuseRequest,
    RequestArrived,
    RequestEnded,
    RequestQueued,
    Tick,
    WorkerRegistered,
    WorkerReported,
)
from scheduler.types import CacheDelta, Duty, DutyState, Placement, PrefixHashes, WorkerAddress, WorkerLoad, WorkerRole
from scheduler.urgency import ServiceClass, Urgency
from scheduler.wire import Answers, Events
from tests.builders import make_worker


@pytest.mark.parametrize(
    "message",
    [
        Tick(),
        PrefillDone("r"),
        RequestArrived("r", 3, 4, ("a",), "b", (PrefixHashes(16, 32, (1, 2)),)),
        PlaceRequest(Placement("r", WorkerAddress("d", "there:1"), None)),
        PlaceRequest(Placement("r", WorkerAddress("d", "there:1"), WorkerAddress("p", "there:2"))),
        WorkerRegistered(make_worker("a"), Duty(DutyState.DRAINING, WorkerRole.DECODE)),
        WorkerReported(
            "a", 1, WorkerLoad(running=3, transfer_failures=(("late", 2),)), cache=CacheDelta(0, b"12345678")
        ),
    ],
)
def test_a_message_comes_out_of_a_pickle_as_it_went_in(message: object) -> None:
    assert pickle.loads(pickle.dumps(message)) == message


def test_no_message_is_pickled_the_slow_way() -> None:
    found = [each for module in (events, types) for each in vars(module).values() if is_dataclass(each)]
    classes = [each for each in found if isinstance(each, type) and each.__module__.startswith("scheduler.")]
    assert set(get_args(events.Event) + get_args(events.Command)) <= set(classes)
    assert [each.__name__ for each in classes if "__reduce__" not in vars(each)] == []


def test_the_events_of_a_call_come_out_of_a_pickle_as_they_went_in() -> None:
    prefixes = (PrefixHashes(16, 32, (1, 2)), PrefixHashes(32, 32, ()))
    told = (
        PrefillDone("r"),
        RequestEnded("r", 3, 4),
        RequestArrived("r", 3, 4),
        RequestArrived("s", 3, 4, ("a",), "b", prefixes, "tenant", Urgency(ServiceClass.BATCH, 2), True, 1.5),
        WorkerReported("a", 1, WorkerLoad(running=3)),
        Tick(),
    )
    assert pickle.loads(pickle.dumps(Events(told))) == told


def test_the_answers_to_a_call_come_out_of_a_pickle_as_they_went_in() -> None:
    decode, prefill = WorkerAddress("d", "there:1"), WorkerAddress("p", "there:2")
    answers: list[list[events.Command]] = [
        [],
        [PlaceRequest(Placement("r", decode, None))],
        [PlaceRequest(Placement("s", decode, prefill))],
        [RequestQueued("t", 3)],
        [PlaceRequest(Placement("u", decode, prefill)), RefuseRequest("v", "no"), BeatEvery("d", 1.0)],
    ]
    assert pickle.loads(pickle.dumps(Answers(answers))) == answers


def test_no_field_of_an_event_is_lost_where_it_goes_flat() -> None:
    """Whoever adds a field changes ``scheduler.wire`` with it."""
    names = {kind: [each.name for each in fields(kind)] for kind in (PrefillDone, RequestEnded, RequestArrived)}
    assert names[PrefillDone] == ["request_id"]
    assert len(names[RequestEnded]) == 3
    assert len(names[RequestArrived]) == 10
    assert len(fields(PrefixHashes)) == 3
