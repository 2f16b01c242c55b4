"""Workers of one node slow each other, for they share its memory and caches: which of them compute at the same time.

Told by the scheduler's own books and not by the workers: a prompt is computed from its placement, or from the end of
those before it, until its first token is out; a sequence decodes until it ends. A worker's steps are then told to the
cost model with how many others computed beside them, so that it learns what a neighbour costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.worker_state import WorkerState


@dataclass(slots=True)
class _Node:
    members: dict[WorkerState, _Member] = field(default_factory=dict)
    num_computing: int = 0


@dataclass(slots=True)
class _Member:
    """Seconds since the last ``take``, as of ``at_s``."""

    node: _Node
    at_s: float
    computes: bool = False
    busy_s: float = 0.0
    beside_s: float = 0.0  # of others, while this one was busy, added up

    @property
    def num_beside(self) -> int:
        return self.node.num_computing - self.computes

    def advance(self, now: float) -> None:
        if self.computes:
            self.busy_s += now - self.at_s
            self.beside_s += (now - self.at_s) * self.num_beside
        self.at_s = now

    def turn(self, computes: bool, now: float) -> None:
        """It begins or ends to compute: what was so far is counted for all on its node."""
        for member in self.node.members.values():
            member.advance(now)
        self.node.num_computing += computes - self.computes
        self.computes = computes


class Neighbours:
    """The workers by node. One that names no node has no neighbours, and costs nothing here.

    A change takes little to note, unless a worker begins or ends to compute: then all of its node are looked at.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}
        self._members: dict[WorkerState, _Member] = {}

    def add(self, worker: WorkerState, now: float) -> None:
        if worker.info.node:
            node = self._nodes.setdefault(worker.info.node, _Node())
            self._members[worker] = node.members[worker] = _Member(node, now)
            self.changed(worker, now)

    def remove(self, worker: WorkerState, now: float) -> None:
        member = self._members.pop(worker, None)
        if member is not None:
            member.turn(False, now)
            del member.node.members[worker]
            if not member.node.members:
                del self._nodes[worker.info.node]

    def changed(self, worker: WorkerState, now: float) -> None:
        """To be called after any change of a worker's books. Harmless for one that is not here."""
        member = self._members.get(worker)
        if member is not None and member.computes is not worker.is_computing:
            member.turn(worker.is_computing, now)

    def beside(self, worker: WorkerState) -> int:
        """How many others compute on its node now."""
        member = self._members.get(worker)
        return member.num_beside if member is not None else 0

    def take(self, worker: WorkerState, now: float) -> float | None:
        """How many others computed on average while this one did, since the last call; None: it did not."""
        member = self._members.get(worker)
        if member is None:
            return 0.0  # it has none
        member.advance(now)
        mean = member.beside_s / member.busy_s if member.busy_s > 0 else None
        member.busy_s = member.beside_s = 0.0
        return mean
