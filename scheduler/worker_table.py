"""The live workers, kept so that no placement looks at all of them."""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from scheduler.types import Phase, WorkerRole
from scheduler.worker_state import WorkerState

Rank = tuple[float | str, ...]  # smaller is better; the last says who is meant, so that no two are equal
Ranking = Callable[[Phase, WorkerState], Rank]
Grouping = Callable[[WorkerState], object]  # workers of one group differ in their rank only
_GARBAGE = 4  # outdated heap entries per worker before a heap is built anew


@dataclass(slots=True, eq=False)
class _Member:
    """A worker in a heap."""

    worker: WorkerState
    phase: Phase
    heap: _Heap
    rank: Rank
    entered: Rank  # what its entry says: no worse than its rank, which counts once the entry has come to the front


@dataclass(slots=True)
class _Heap:
    """The workers of one group by rank. Whoever gets worse is moved when it is in front, for most never are."""

    entries: list[tuple[Rank, int, _Member]] = field(default_factory=list)  # also outdated ones, of other ranks
    members: dict[WorkerState, _Member] = field(default_factory=dict)
    num_puts: int = 0  # numbers the entries, so that no comparison gets as far as the members

    def add(self, worker: WorkerState, phase: Phase, rank: Rank) -> _Member:
        self.members[worker] = member = _Member(worker, phase, self, rank, rank)
        self.push(member)
        return member

    def remove(self, member: _Member) -> None:
        del self.members[member.worker]
        member.entered = member.rank = ()

    def best(self, avoid: Collection[str]) -> WorkerState | None:
        """The best worker that is not to be avoided."""
        entries = self.entries
        while entries:
            rank, number, member = entries[0]
            if rank is not member.entered:
                heapq.heappop(entries)
            elif rank != member.rank:
                member.entered = member.rank
                heapq.heapreplace(entries, (member.rank, number, member))
            elif avoid and member.worker.worker_id in avoid:
                passed = heapq.heappop(entries)
                found = self.best(avoid)
                heapq.heappush(entries, passed)
                return found
            else:
                return member.worker
        return None

    def push(self, member: _Member) -> None:
        """Enters a member by ``entered``, which must be new."""
        self.num_puts += 1
        heapq.heappush(self.entries, (member.entered, self.num_puts, member))
        if len(self.entries) > _GARBAGE * len(self.members) + 64:
            self.entries = [(each.entered, number, each) for number, each in enumerate(self.members.values())]
            heapq.heapify(self.entries)


@dataclass(slots=True)
class _Members:
    """Workers in a list, for those who draw or count: joins, leaves and the n-th are quick."""

    workers: list[WorkerState] = field(default_factory=list)
    positions: dict[WorkerState, int] = field(default_factory=dict)

    def add(self, worker: WorkerState) -> None:
        self.positions[worker] = len(self.workers)
        self.workers.append(worker)

    def remove(self, worker: WorkerState) -> None:
        position = self.positions.pop(worker)
        last = self.workers.pop()
        if last is not worker:
            self.workers[position] = last
            self.positions[last] = position


@dataclass(slots=True)
class _Shuffled:
    """Workers in an order that has to do with nothing but their ids, not with when they came either.

    So the first of them are a fair sample of all, and the same ones but for one when another joins or leaves.
    """

    workers: list[WorkerState] = field(default_factory=list)

    def add(self, worker: WorkerState) -> None:
        insort(self.workers, worker, key=_shuffling)

    def remove(self, worker: WorkerState) -> None:
        del self.workers[bisect_left(self.workers, _shuffling(worker), key=_shuffling)]


def _shuffling(worker: WorkerState) -> bytes:
    return hashlib.sha256(worker.worker_id.encode()).digest()


class WorkerTable:
    """Workers by id, by phase, by role, by rank within their group, and by when they were heard.

    Args:
        ranking: the order that a policy asks ``best`` for; None: it never does.
        grouping: workers whose ranks cannot be compared, for they are of different kinds, are in different groups.
    """

    def __init__(self, ranking: Ranking | None = None, grouping: Grouping = lambda _worker: None) -> None:
        self._ranking = ranking
        self._grouping = grouping
        self._workers: dict[str, WorkerState] = {}
        self._members = {phase: _Members() for phase in Phase}
        self._of_role = {role: _Shuffled() for role in WorkerRole}  # the active ones
        self._heaps: dict[Phase, dict[object, _Heap]] = {phase: {} for phase in Phase}  # none is empty
        self._ranked: dict[WorkerState, list[_Member]] = {}
        self._group_of: dict[WorkerState, object] = {}  # of those ranked
        self._heard: OrderedDict[WorkerState, None] = OrderedDict()  # longest silent first
        self._num_unpriced = 0
        self.num_places = 0  # sequences that those that decode do at once
        self.num_changing = 0  # on their way to another role
        self._ids: list[str] = []  # in order

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[WorkerState]:
        return iter(self._workers.values())

    def get(self, worker_id: str) -> WorkerState | None:
        return self._workers.get(worker_id)

    def active(self, worker_ids: Iterable[str], avoid: Collection[str]) -> list[WorkerState]:
        """Those of them that are here, take requests and are not to be avoided, in order."""
        found = []
        for worker_id in worker_ids:
            worker = self._workers.get(worker_id)
            if worker is not None and worker.is_active and worker_id not in avoid:
                found.append(worker)
        return found

    @property
    def all_priced(self) -> bool:
        """Whether costs can be told in money; else a second counts the same on every device."""
        return not self._num_unpriced

    def add(self, worker: WorkerState) -> None:
        """Enters a worker, which must not be here, at the time of its ``last_heard_s``."""
        self._workers[worker.worker_id] = worker
        insort(self._ids, worker.worker_id)
        self._heard[worker] = None
        self._num_unpriced += not worker.info.device.price_per_hour
        self.num_changing += worker.duty.next_role is not None
        if worker.is_active:
            self._of_role[worker.role].add(worker)
        phases = [phase for phase in Phase if worker.takes(phase)]
        for phase in phases:
            self._members[phase].add(worker)
        self.num_places += worker.info.max_num_seqs * (Phase.DECODE in phases)
        self._enter_heaps(worker)

    def remove(self, worker: WorkerState) -> None:
        del self._workers[worker.worker_id], self._heard[worker]
        del self._ids[bisect_left(self._ids, worker.worker_id)]
        self._num_unpriced -= not worker.info.device.price_per_hour
        self.num_changing -= worker.duty.next_role is not None
        if worker.is_active:
            self._of_role[worker.role].remove(worker)
        for phase in Phase:
            if worker.takes(phase):
                self._members[phase].remove(worker)
        self.num_places -= worker.info.max_num_seqs * worker.takes(Phase.DECODE)
        self._leave_heaps(worker)

    def _enter_heaps(self, worker: WorkerState) -> None:
        if self._ranking is None:
            return
        self._group_of[worker] = group = self._grouping(worker)
        self._ranked[worker] = [
            self._heaps[phase].setdefault(group, _Heap()).add(worker, phase, self._ranking(phase, worker))
            for phase in Phase
            if worker.takes(phase)
        ]

    def _leave_heaps(self, worker: WorkerState) -> None:
        self._group_of.pop(worker, None)
        for member in self._ranked.pop(worker, ()):
            member.heap.remove(member)
            if not member.heap.members:
                heaps = self._heaps[member.phase]
                self._heaps[member.phase] = {key: other for key, other in heaps.items() if other.members}

    def learned(self, worker: WorkerState) -> None:
        """To be called when something was learned of a worker that is here: it may be of another group now."""
        if self._ranking is not None and self._grouping(worker) != self._group_of[worker]:
            self._leave_heaps(worker)
            self._enter_heaps(worker)

    def changed(self, worker: WorkerState) -> None:
        """To be called after any change of a worker's books. Harmless for one that is not here."""
        if self._ranking is not None:
            for member in self._ranked.get(worker, ()):
                member.rank = rank = self._ranking(member.phase, worker)
                if rank < member.entered:
                    member.entered = rank
                    member.heap.push(member)

    def heard(self, worker: WorkerState) -> None:
        """It was heard of just now."""
        self._heard.move_to_end(worker)

    def silent_since(self, time_s: float) -> list[WorkerState]:
        """Those that were last heard of before ``time_s``."""
        silent = []
        for worker in self._heard:
            if worker.last_heard_s >= time_s:
                break
            silent.append(worker)
        return silent

    def after(self, worker_id: str, limit: int | None) -> list[WorkerState]:
        """Workers in the order of their ids, those up to ``worker_id`` left out; at most ``limit``."""
        first = bisect_right(self._ids, worker_id)
        return [self._workers[each] for each in islice(self._ids, first, None if limit is None else first + limit)]

    def taking(self, phase: Phase) -> list[WorkerState]:
        """All workers that take a phase, in no order of meaning. Do not change it."""
        return self._members[phase].workers

    def of_role(self, role: WorkerRole) -> list[WorkerState]:
        """All active workers of a role; the first so many are a fair sample of them. Do not change it."""
        return self._of_role[role].workers

    def best(self, phase: Phase, avoid: Collection[str] = ()) -> list[WorkerState]:
        """The best of each group; those of ``avoid`` only where there is nobody else in any group."""
        found = []
        for heap in self._heaps[phase].values():
            rank, _, member = heap.entries[0]
            if rank is member.rank and not avoid:  # as it mostly is: the entry in front says how things are
                found.append(member.worker)
            elif (worker := heap.best(avoid)) is not None:
                found.append(worker)
        if not found and avoid:
            return self.best(phase)
        return found
