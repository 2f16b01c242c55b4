"""Who is next, beside a slow reference of the Virtual Token Counter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.queue import FairQueue, Waiting, WaitingQueue
from scheduler.urgency import ORDINARY, ServiceClass, Urgency
from tests.builders import repeatable

INTERACTIVE, BATCH = ServiceClass.INTERACTIVE, ServiceClass.BATCH
_ARRIVALS = count()


def waiting(
    name: str,
    tenant: str = "a",
    service: float = 1.0,
    *,
    urgency: Urgency = ORDINARY,
    deadline_s: float | None = None,
) -> Waiting:
    return Waiting(name, tenant, urgency, service, next(_ARRIVALS), 0.0, deadline_s)


@dataclass(slots=True)
class ReferenceVtc:
    """Algorithm 2 of the paper, scanning: counters, a lift on joining, the least one is served."""

    weights: dict[str, float]
    queue: list[Waiting] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    last_left: str | None = None

    def push(self, item: Waiting) -> None:
        others = {each.tenant for each in self.queue}
        own = self.counters.setdefault(item.tenant, 0.0)
        if item.tenant not in others:
            if others:
                own = max(own, min(self.counters[tenant] for tenant in others))
            elif self.last_left is not None:
                own = max(own, self.counters[self.last_left])
            self.counters[item.tenant] = own
        self.queue.append(item)

    def pop(self) -> Waiting | None:
        if not self.queue:
            return None
        item = min(self.queue, key=lambda each: (self.counters[each.tenant], each.tenant, *each.line_key))
        self.queue.remove(item)
        if all(each.tenant != item.tenant for each in self.queue):
            self.last_left = item.tenant
        self.charge(item.tenant, item.service)
        return item

    def charge(self, tenant: str, service: float) -> None:
        self.counters[tenant] = self.counters.get(tenant, 0.0) + service / self.weights.get(tenant, 1.0)


def pop(queue: FairQueue) -> Waiting | None:
    """Charged before it leaves, as the controller does."""
    item = queue.first()
    if item is not None:
        queue.charge(item.tenant, item.service)
        queue.remove(item)
    return item


PUSH = st.tuples(st.sampled_from("abcd"), st.integers(1, 50), st.integers(-1, 1))
ACTIONS = st.lists(st.one_of(PUSH, st.none(), st.tuples(st.sampled_from("abcd"), st.integers(-20, 20))), max_size=60)


@given(ACTIONS, st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 4.0]) for name in "ab"}))
@repeatable(300)
def test_the_queue_serves_as_the_reference_does(
    actions: Sequence[tuple[str, int, int] | tuple[str, int] | None], weights: dict[str, float]
) -> None:
    queue, reference = FairQueue(weights), ReferenceVtc(weights)
    for action in actions:
        if action is None:
            expected_order = list(queue.order())
            popped = pop(queue)
            assert popped == reference.pop()
            assert expected_order[:1] == [popped] * bool(expected_order)
        elif len(action) == 3:
            tenant, service, priority = action
            item = waiting(f"r{next(_ARRIVALS)}", tenant, service, urgency=Urgency(priority=priority))
            queue.push(item)
            reference.push(item)
        else:
            queue.charge(*action)
            reference.charge(*action)
    order = list(queue.order())
    assert [pop(queue) for _ in order] == order
    assert pop(queue) is None


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), min_size=40, max_size=40),
    st.sampled_from([0.5, 1.0, 3.0]),
)
@repeatable(100)
def test_two_backlogged_tenants_differ_by_one_request_at_most(costs: list[tuple[int, int]], weight: float) -> None:
    """Service over weight, at every moment while both wait; the paper's bound with charges known at the start."""
    weights = {"a": 1.0, "b": weight}
    queue = FairQueue(weights)
    for of_a, of_b in costs:
        queue.push(waiting(f"r{next(_ARRIVALS)}", "a", of_a))
        queue.push(waiting(f"r{next(_ARRIVALS)}", "b", of_b))
    got = {"a": 0.0, "b": 0.0}
    left = {"a": len(costs), "b": len(costs)}
    while left["a"] and left["b"]:
        item = pop(queue)
        assert item is not None
        left[item.tenant] -= 1
        got[item.tenant] += item.service / weights[item.tenant]
        assert abs(got["a"] - got["b"]) <= 100 / min(weights.values())


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=60, max_size=60), st.integers(1, 8))
@repeatable(100)
def test_wrong_predictions_of_the_output_are_evened_out(lengths: list[tuple[int, int]], num_running: int) -> None:
    """Charged as predicted at the start and corrected at the end: the difference stays within what runs."""
    queue = FairQueue({})
    for index in range(len(lengths)):
        for tenant in "ab":
            queue.push(waiting(f"{tenant}{index}", tenant, 30))
    truth = {"a": iter([long for long, _ in lengths]), "b": iter([short for _, short in lengths])}
    got = {"a": 0.0, "b": 0.0}
    running: list[tuple[str, int]] = []
    for _ in range(len(lengths)):
        item = pop(queue)
        assert item is not None
        running.append((item.tenant, next(truth[item.tenant])))
        if len(running) > num_running:
            tenant, true_service = running.pop(0)
            got[tenant] += true_service
            queue.charge(tenant, true_service - 30)
        assert abs(got["a"] - got["b"]) <= 60 * (num_running + 2)


def test_one_that_was_away_cannot_save_up() -> None:
    queue = FairQueue({})
    for index in range(20):
        queue.push(waiting(f"a{index}", "a", 10))
    for _ in range(10):
        pop(queue)
    for index in range(10):
        queue.push(waiting(f"b{index}", "b", 10))
    served = [item.tenant for _ in range(10) if (item := pop(queue)) is not None]
    assert served.count("b") == 5


def test_who_used_what_nobody_wanted_does_not_pay_for_it_later() -> None:
    queue = FairQueue({})
    for _ in range(100):
        queue.serve_at_once("a", 10)
    for index in range(10):
        queue.push(waiting(f"b{index}", "b", 10))
        queue.push(waiting(f"a{index}", "a", 10))
    served = [item.tenant for _ in range(10) if (item := pop(queue)) is not None]
    assert served.count("a") == 5


def test_a_lone_tenant_is_never_held_back() -> None:
    queue = FairQueue({"a": 0.01})
    for index in range(5):
        queue.push(waiting(f"a{index}", "a", 1000))
    assert [item.request_id for _ in range(5) if (item := pop(queue)) is not None] == [f"a{n}" for n in range(5)]


# Classes, room, deadlines and positions


def make_queue(max_waiting: int = 100) -> WaitingQueue:
    return WaitingQueue(max_waiting, {})


def names(queue: WaitingQueue) -> list[str]:
    """In order."""
    known: Sequence[str] = list(queue._items)
    return sorted(known, key=lambda name: queue.position(name) or 0)


def test_positions_count_the_classes_before_and_turns_among_tenants() -> None:
    queue = make_queue()
    queue.push(waiting("batch", urgency=Urgency(BATCH)))
    for name, tenant in (("a0", "a"), ("a1", "a"), ("a2", "a"), ("b0", "b")):
        queue.push(waiting(name, tenant))
    assert [queue.position(name) for name in ("a0", "b0", "a1", "a2", "batch")] == [0, 1, 2, 3, 4]
    queue.remove("a0")
    assert [queue.position(name) for name in ("a0", "a1", "b0", "batch")] == [None, 0, 1, 3]


def test_a_full_queue_gives_up_batch_work_for_an_interactive_request() -> None:
    queue = make_queue(2)
    queue.push(waiting("chat 1"))
    queue.push(waiting("batch", urgency=Urgency(BATCH)))
    left = queue.push(waiting("chat 2"))
    assert left is not None
    assert left.request_id == "batch"
    left = queue.push(waiting("batch 2", urgency=Urgency(BATCH)))
    assert left is not None
    assert left.request_id == "batch 2"
    assert names(queue) == ["chat 1", "chat 2"]


def test_who_floods_the_queue_loses_its_own_last_request() -> None:
    queue = make_queue(4)
    for index in range(4):
        queue.push(waiting(f"a{index}", "a"))
    left = queue.push(waiting("b0", "b"))
    assert left is not None
    assert left.request_id == "a3"
    left = queue.push(waiting("a4", "a"))
    assert left is not None
    assert left.request_id == "a4"


def test_deadlines_that_pass_are_taken_out_and_others_stay() -> None:
    queue = make_queue()
    queue.push(waiting("soon", deadline_s=1.0))
    queue.push(waiting("later", deadline_s=2.0))
    queue.push(waiting("never"))
    queue.push(waiting("gone", deadline_s=1.5))
    queue.remove("gone")
    assert [item.request_id for item in queue.pop_expired(1.7)] == ["soon"]
    assert names(queue) == ["later", "never"]
    assert queue.length_of(INTERACTIVE) == 2


@pytest.mark.parametrize("service_class", ServiceClass)
def test_removing_twice_is_harmless(service_class: ServiceClass) -> None:
    queue = make_queue()
    queue.push(waiting("r", urgency=Urgency(service_class)))
    assert queue.remove("r") is not None
    assert queue.remove("r") is None
    assert len(queue) == 0
    assert queue.first(service_class) is None
