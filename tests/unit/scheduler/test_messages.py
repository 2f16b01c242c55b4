"""What crosses processes comes out of a pickle as it went in."""

from __future__ import annotations

import pickle
from dataclasses import is_dataclass
from typing import get_args

import pytest

from scheduler import events, types
from scheduler.events import PlaceRequest, PrefillDone, RequestArrived, Tick, WorkerRegistered, WorkerReported
from scheduler.types import CacheDelta, Duty, DutyState, Placement, PrefixHashes, WorkerAddress, WorkerLoad, WorkerRole
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
