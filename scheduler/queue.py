"""Who waits for a worker, and who is next: by class, then fairly between tenants, then by priority and arrival.

Tenants of one class share it by the Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language
Models" (OSDI 2024): whoever got the least service so far, over its weight, is next; one that had nothing to wait for
is lifted to the least of those that wait, so that it cannot save up. Somebody is always next: no capacity is kept
for who is away. A request's service is charged when it is placed, its output as predicted, and corrected when it
has ended (the paper's variant with prediction).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from scheduler.urgency import ServiceClass, Urgency


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request in the queue."""

    request_id: str
    tenant: str
    urgency: Urgency
    service: float  # what placing it charges to its tenant
    arrival: int  # order of arrival at the controller
    since_s: float
    deadline_s: float | None = None  # to be placed by; None: it may wait for ever

    @property
    def line_key(self) -> tuple[int, int]:
        """A tenant orders its own requests by priority; it cannot pass another tenant's with it."""
        return self.urgency.priority, self.arrival


class FairQueue:
    """The requests of one class. A tenant that ``weights`` does not name has weight 1."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._lines: dict[str, list[Waiting]] = {}  # of tenants that wait, each in order; none is empty
        self._counters: dict[str, float] = {}  # service over weight
        self._heap: list[tuple[float, str]] = []  # the waiting tenants' counters; and old ones, see _least
        self._last_counter = 0.0  # of the tenant that left the queue last
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, item: Waiting) -> None:
        if item.tenant not in self._lines:
            self._lift(item.tenant)
            self._lines[item.tenant] = []
            self._note(item.tenant)
        insort(self._lines[item.tenant], item, key=lambda waiting: waiting.line_key)
        self._num_waiting += 1

    def remove(self, item: Waiting) -> None:
        line = self._lines[item.tenant]
        del line[bisect_left(line, item.line_key, key=lambda waiting: waiting.line_key)]
        self._num_waiting -= 1
        if not line:
            del self._lines[item.tenant]
            self._last_counter = self.counter(item.tenant)

    def first(self) -> Waiting | None:
        """Who is next, if anybody waits."""
        tenant = self._least()
        return None if tenant is None else self._lines[tenant][0]

    def last_of_longest_line(self, latest: str) -> Waiting | None:
        """Who goes when there are too many: the last of the tenant with the most waiting, over its weight.

        Among equals it is the tenant ``latest``.
        """
        if not self._lines:
            return None
        tenant = max(self._lines, key=lambda name: (len(self._lines[name]) / self._weight(name), name == latest))
        return self._lines[tenant][-1]

    def num_ahead(self, tenant: str, priority: int) -> float:
        """About how many would be placed before a newcomer, if all asked for as much: its tenant's own that are not
        behind it, and of each other tenant as many as take turns with those, by weight."""
        own = bisect_right(self._lines.get(tenant, []), priority, key=lambda waiting: waiting.urgency.priority)
        turns = (own + 1) / self._weight(tenant)
        others = (min(len(line), turns * self._weight(name)) for name, line in self._lines.items() if name != tenant)
        return own + sum(others)

    def charge(self, tenant: str, service: float) -> None:
        """Books service that a tenant got; less than 0 takes back what was booked too much."""
        self._counters[tenant] = self.counter(tenant) + service / self._weight(tenant)
        if tenant in self._lines:
            self._note(tenant)

    def serve_at_once(self, tenant: str, service: float) -> None:
        """Books service for a request that did not have to wait, as if it had come and gone in a moment.

        So who used capacity that nobody else wanted does not pay for it later.
        """
        if tenant not in self._lines:
            self._lift(tenant)
        self.charge(tenant, service)
        if not self._lines:
            self._last_counter = self.counter(tenant)

    def counter(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    def order(self) -> Iterator[Waiting]:
        """All that wait, in the order in which they would be placed if nothing else came."""
        heads = [(self.counter(tenant), tenant, 0) for tenant in self._lines]
        heapq.heapify(heads)
        while heads:
            counter, tenant, place = heapq.heappop(heads)
            line = self._lines[tenant]
            yield line[place]
            if place + 1 < len(line):
                heapq.heappush(heads, (counter + line[place].service / self._weight(tenant), tenant, place + 1))

    def _lift(self, tenant: str) -> None:
        least = self._least()
        floor = self._last_counter if least is None else self.counter(least)
        self._counters[tenant] = max(self.counter(tenant), floor)

    def _least(self) -> str | None:
        """The waiting tenant with the least counter. Entries of the heap that do not hold any more are dropped."""
        while self._heap:
            counter, tenant = self._heap[0]
            if tenant in self._lines and counter == self.counter(tenant):
                return tenant
            heapq.heappop(self._heap)
        return None

    def _note(self, tenant: str) -> None:
        heapq.heappush(self._heap, (self.counter(tenant), tenant))

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)


class WaitingQueue:
    """All that wait for a worker, at most ``max_waiting``."""

    def __init__(self, max_waiting: int, weights: Mapping[str, float]) -> None:
        self._max_waiting = max_waiting
        self._classes = {service_class: FairQueue(weights) for service_class in ServiceClass}
        self._items: dict[str, Waiting] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; those that left stay until their time has come
        self._positions: dict[str, int] | None = None  # None: something has changed

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._items

    def length_of(self, service_class: ServiceClass) -> int:
        return len(self._classes[service_class])

    def push(self, item: Waiting) -> Waiting | None:
        """Takes one in. Returns who has to leave for want of room, which may be the newcomer itself.

        It is the last of the longest line, over the tenant's weight, of the last class: so batch requests make room
        for interactive ones, and a tenant that floods the queue loses its own.
        """
        self._items[item.request_id] = item
        self._classes[item.urgency.service_class].push(item)
        self._positions = None
        if item.deadline_s is not None:
            heapq.heappush(self._deadlines, (item.deadline_s, item.request_id))
        if len(self._items) <= self._max_waiting:
            return None
        for service_class in reversed(ServiceClass):
            victim = self._classes[service_class].last_of_longest_line(item.tenant)
            if victim is not None:
                return self.remove(victim.request_id)
        return None

    def remove(self, request_id: str) -> Waiting | None:
        """Takes one out: placed, refused, or its client is gone. None where it does not wait."""
        item = self._items.pop(request_id, None)
        if item is not None:
            self._classes[item.urgency.service_class].remove(item)
            self._positions = None
        return item

    def first(self, service_class: ServiceClass) -> Waiting | None:
        return self._classes[service_class].first()

    def charge(self, tenant: str, service_class: ServiceClass, service: float) -> None:
        """Books service; see ``FairQueue.charge``."""
        self._classes[service_class].charge(tenant, service)
        self._positions = None

    def num_ahead(self, tenant: str, urgency: Urgency) -> float:
        """About how many would be placed before a newcomer: all of the classes before, and some of its own."""
        own = urgency.service_class
        before = sum(len(queue) for each, queue in self._classes.items() if each.rank < own.rank)
        return before + self._classes[own].num_ahead(tenant, urgency.priority)

    def serve_at_once(self, tenant: str, service_class: ServiceClass, service: float) -> None:
        """Books service of one that did not wait; see ``FairQueue.serve_at_once``."""
        self._classes[service_class].serve_at_once(tenant, service)
        self._positions = None

    def pop_expired(self, now: float) -> list[Waiting]:
        """Takes out those whose deadline has passed."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            item = self._items.get(request_id)
            if item is not None and item.deadline_s == deadline_s:
                self.remove(request_id)
                expired.append(item)
        return expired

    def position(self, request_id: str) -> int | None:
        """How many are before it, as things stand; None where it does not wait.

        One walk over the queue serves all questions until something changes.
        """
        if self._positions is None:
            in_order = (item for service_class in ServiceClass for item in self._classes[service_class].order())
            self._positions = {item.request_id: place for place, item in enumerate(in_order)}
        return self._positions.get(request_id)
