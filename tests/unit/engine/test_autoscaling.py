"""Pools that scale by themselves: from the scheduler's view to the fleet's members and to what Ray is asked for."""

from __future__ import annotations

import pytest

from engine.autoscaling import INTERVAL_S, TELL_INTERVAL_S, Autoscaling
from engine.config import load_config
from engine.node_requests import EXPIRY_S, NodeRequests
from kvcache.errors import ConfigError
from scheduler.autoscaler import HOLD_DOWN_S, HOLD_UP_S, PoolLimits
from scheduler.room import Room
from scheduler.types import ClusterSnapshot, PoolLoad, WorkerRole
from tests.fakes import FakeNodeMarket, ManualClock

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
TARGETS = {PREFILL: 1.0, DECODE: 0.1}


def view(latency_s: float, busyness: float, role: WorkerRole = DECODE) -> ClusterSnapshot:
    return ClusterSnapshot(pools=(PoolLoad(role, 1, latency_s, busyness),))


def decisions(autoscaling: Autoscaling, cluster: ClusterSnapshot, seconds: float, count: int) -> list[int]:
    """What a pool of ``count`` workers that stays so is told, step by step."""
    told = []
    now = 100.0
    for _ in range(int(seconds / 0.5)):
        now += 0.5
        told += autoscaling.decide(
            cluster, dict.fromkeys(WorkerRole, count), dict.fromkeys(WorkerRole, 0), now
        ).values()
    return told


def test_a_pool_that_misses_its_target_is_told_to_grow() -> None:
    autoscaling = Autoscaling({DECODE: PoolLimits(1, 4)}, TARGETS, FakeNodeMarket())
    assert decisions(autoscaling, view(0.3, 1.4), HOLD_UP_S + 2 * INTERVAL_S, count=1)[0] == 2


def test_a_pool_that_keeps_it_with_ease_is_told_to_shrink() -> None:
    autoscaling = Autoscaling({DECODE: PoolLimits(1, 4)}, TARGETS, FakeNodeMarket())
    assert decisions(autoscaling, view(0.01, 0.05), HOLD_DOWN_S + 2 * INTERVAL_S, count=3)[0] == 2


def test_a_pool_without_limits_is_left_alone() -> None:
    autoscaling = Autoscaling({PREFILL: PoolLimits(1, 4)}, TARGETS, FakeNodeMarket())
    assert decisions(autoscaling, view(5.0, 9.0), 100, count=1) == []


def test_nodes_are_told_of_when_they_change_now_and_then_and_at_the_end() -> None:
    ray = FakeNodeMarket()
    autoscaling = Autoscaling({DECODE: PoolLimits(1, 4)}, TARGETS, ray)
    small, large = [Room()], [Room(), Room(2)]
    for now, rooms in enumerate((small, small, large, large)):
        autoscaling.request(rooms, 100.0 + now)
    assert ray.asked == [small, large]
    autoscaling.request(large, 102.0 + TELL_INTERVAL_S)
    autoscaling.close()
    assert ray.asked == [small, large, large, []]


class SharedRay:
    """The actor of all servers, and what it asks Ray for."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.asked: list[list[Room]] = []
        self.requests = NodeRequests(lambda rooms: self.asked.append(list(rooms)), self.clock)


def test_servers_of_one_cluster_do_not_overwrite_each_other() -> None:
    ray = SharedRay()
    first, second = Room(1, labels=(("tier", "a"),)), Room(2)
    ray.requests.tell("a", (first,))
    ray.requests.tell("b", (second, second))
    ray.requests.tell("a", (first,))
    ray.requests.tell("a", (first, first))
    ray.requests.tell("b", ())
    ray.requests.tell("a", ())
    assert ray.asked == [[first], [first, second, second], [first, first, second, second], [first, first], []]


def test_a_server_that_is_not_heard_of_any_more_needs_nothing() -> None:
    ray = SharedRay()
    ray.requests.tell("killed", (Room(2),))
    ray.clock.now_s += EXPIRY_S / 2
    ray.requests.tell("a", (Room(),))
    ray.clock.now_s += EXPIRY_S / 2 + 1
    ray.requests.tell("a", (Room(),))
    assert ray.asked[1:] == [[Room(), Room(2)], [Room()]]


def test_limits_come_from_the_options() -> None:
    flags = {"address": "auto", "decode_workers": "2", "max_decode_workers": "6", "min_decode_workers": "1"}
    assert load_config(flags).pool_limits == {DECODE: PoolLimits(1, 6)}
    assert load_config({"address": "auto", "max_prefill_workers": "3"}).pool_limits == {PREFILL: PoolLimits(1, 3)}


BAD = {
    "on one machine": ({"max_decode_workers": "4"}, "this machine has no more nodes: set address too"),
    "beside roles that change": ({"address": "auto", "max_decode_workers": "4", "roles": "auto"}, "roles is auto"),
    "a minimum alone": ({"address": "auto", "min_decode_workers": "1"}, "without max_decode_workers nothing scales"),
    "above the maximum": (
        {"address": "auto", "decode_workers": "5", "max_decode_workers": "4"},
        "decode_workers is 5, and autoscaling would keep it from 5 to 4",
    ),
    "below the minimum": (
        {"address": "auto", "decode_workers": "1", "min_decode_workers": "2", "max_decode_workers": "4"},
        "decode_workers is 1, and autoscaling would keep it from 2 to 4",
    ),
    "a minimum above the maximum": (
        {"address": "auto", "decode_workers": "3", "min_decode_workers": "3", "max_decode_workers": "2"},
        "min_decode_workers is 3 and max_decode_workers 2",
    ),
    "of a pool that is none": (
        {"address": "auto", "colocated": "1", "max_decode_workers": "4"},
        "decode_workers is 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_limits_that_contradict_are_refused(case: str) -> None:
    flags, words = BAD[case]
    with pytest.raises(ConfigError, match=words):
        load_config(flags)
