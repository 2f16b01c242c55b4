"""More workers than the cluster can hold are refused when they are asked for, not waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from engine.admin import Operator
from engine.fleet import Fleet
from kvcache.errors import RequestError
from scheduler.room import Node, Room
from scheduler.types import ClusterSnapshot, WorkerRole
from tests.builders import make_options

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
ROOMS = {
    PREFILL: Room(1, (("CPU", 2.0), ("GPU", 1.0))),
    DECODE: Room(2, (("CPU", 1.0), ("GPU", 1.0)), (("tier", "d"),)),
}
NODES = [
    Node("a", "a.test", {"CPU": 8.0, "GPU": 2.0}),
    Node("b", "b.test", {"CPU": 8.0, "GPU": 4.0}, {"tier": "d"}),
]


NOBODY: Any = None  # no worker is started here, and no scheduler asked


def make_fleet() -> Fleet:
    workers = [
        replace(make_options(), worker_id=f"{role.value}-0", role=role, room=room) for role, room in ROOMS.items()
    ]
    return Fleet(workers, NOBODY, NOBODY)


def scale(fleet: Fleet, counts: dict[WorkerRole, int], nodes: Callable[[], Sequence[Node]] | None) -> dict[str, int]:
    operator = Operator(NOBODY, fleet, ClusterSnapshot, {}, ROOMS, nodes)
    asyncio.run(operator.scale(counts))
    return {role.value: fleet.num_workers(role) for role in ROOMS}


def test_as_many_workers_as_the_nodes_hold_are_started() -> None:
    assert scale(make_fleet(), {PREFILL: 2, DECODE: 2}, lambda: NODES) == {"prefill": 2, "decode": 2}


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (
            {PREFILL: 5},
            "there is room for 4 of 5 prefill workers; each needs 1 GPU (the most that a node has left: 0 GPU)",
        ),
        (
            {DECODE: 3},
            "there is room for 2 of 3 decode workers; each needs on a node with the label tier=d for its 2 ranks",
        ),
        ({PREFILL: 3, DECODE: 2}, "there is room for 2 of 3 prefill workers"),
    ],
)
def test_more_than_the_nodes_hold_is_refused_and_nothing_is_changed(counts: dict[WorkerRole, int], words: str) -> None:
    fleet = make_fleet()
    with pytest.raises(RequestError) as caught:
        scale(fleet, counts, lambda: NODES)
    assert str(caught.value).startswith(f"the cluster cannot hold so many workers: {words}")
    assert [fleet.num_workers(role) for role in ROOMS] == [1, 1]


def test_fewer_workers_need_no_room() -> None:
    fleet = make_fleet()
    fleet.scale({DECODE: 2})
    assert scale(fleet, {DECODE: 1}, list) == {"prefill": 1, "decode": 1}


def test_where_ray_adds_nodes_workers_wait_for_them() -> None:
    assert scale(make_fleet(), {PREFILL: 9}, None) == {"prefill": 9, "decode": 1}


def test_a_role_that_the_server_knows_nothing_of_is_refused_as_ever() -> None:
    with pytest.raises(RequestError, match="without colocated workers"):
        scale(make_fleet(), {WorkerRole.COLOCATED: 1}, lambda: NODES)


def test_workers_that_changed_their_role_stay_where_they_are() -> None:
    """One that decodes now still takes the room of a prefill worker."""
    fleet = make_fleet()
    fleet.scale({PREFILL: 3})
    changed = fleet.members["prefill-2"]
    changed.options = replace(changed.options, role=DECODE)
    nodes = [
        Node("a", "a.test", {"CPU": 6.0, "GPU": 3.0}),
        Node("b", "b.test", {"CPU": 4.0, "GPU": 4.0}, {"tier": "d"}),
    ]
    assert scale(fleet, {DECODE: 3}, lambda: nodes) == {"prefill": 2, "decode": 3}
    with pytest.raises(RequestError):
        scale(fleet, {DECODE: 4}, lambda: nodes)
