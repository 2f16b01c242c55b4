"""Whether the nodes of a cluster have room for the workers that were asked for; said before one is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Room:
    """What one worker takes of one node: a bundle of resources for each rank, all ranks on the same node.

    ``resources`` and ``labels`` are Ray's: amounts by name, and values that the node's labels must have.
    """

    num_ranks: int = 1
    resources: tuple[tuple[str, float], ...] = (("CPU", 0.01),)
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def total(self) -> dict[str, float]:
        return {name: amount * self.num_ranks for name, amount in self.resources}


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that the workers may run on, with all that it has."""

    node_id: str
    address: str
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wanted:
    """So many equal workers. ``name`` is for the message, e.g. "decode"."""

    name: str
    count: int
    room: Room


def find_shortage(nodes: Sequence[Node], wanted: Sequence[Wanted]) -> str | None:
    """What is missing, and how much, as one sentence; None when all workers find room.

    First fit, those with the fewest suitable nodes first, each onto the node that it leaves the least of. What others
    use of the cluster at the moment is not looked at: Ray waits until it is free.
    """
    free = {node.node_id: dict(node.resources) for node in nodes}
    for group in sorted(wanted, key=lambda each: sum(suits(each.room, node) for node in nodes)):
        suitable = [node for node in nodes if _has_labels(group.room, node)]
        if not suitable and group.count:
            return f"no node has {_labels(group.room)}, which the {group.name} workers need{_seen(nodes, group.room)}"
        for placed in range(group.count):
            node = _best(suitable, free, group.room)
            if node is None:
                return _short_of(group, placed, suitable, free)
            for name, amount in group.room.total.items():
                free[node.node_id][name] -= amount
    return None


def largest_share(nodes: Sequence[Node], num_ranks: int, resource: str = "CPU") -> int:
    """The most of a resource, in whole numbers, that every rank can have; 0 when there are too few."""
    amounts = [int(node.resources.get(resource, 0)) for node in nodes]
    return next((share for share in range(max(amounts, default=0), 0, -1) if _ranks(amounts, share) >= num_ranks), 0)


def _ranks(amounts: Sequence[int], share: int) -> int:
    return sum(amount // share for amount in amounts)


def _has_labels(room: Room, node: Node) -> bool:
    return all(node.labels.get(key) == value for key, value in room.labels)


def _fits(room: Room, free: Resources) -> bool:
    return all(free.get(name, 0.0) >= amount for name, amount in room.total.items())


def suits(room: Room, node: Node) -> bool:
    """Whether the node would hold one such worker, if it held nothing else."""
    return _has_labels(room, node) and _fits(room, node.resources)


def _best(nodes: Sequence[Node], free: Mapping[str, Resources], room: Room) -> Node | None:
    fitting = [node for node in nodes if _fits(room, free[node.node_id])]
    return min(fitting, key=lambda node: _left(free[node.node_id], room), default=None)


def _left(free: Resources, room: Room) -> float:
    """The part of what a worker takes that is left on a node after it, in the resource that is scarcest there."""
    return min(free[name] / amount for name, amount in room.total.items())


def _short_of(group: Wanted, placed: int, nodes: Sequence[Node], free: Mapping[str, Resources]) -> str:
    total = group.room.total
    lacks = {name: max(free[node.node_id].get(name, 0.0) for node in nodes) for name in total}
    missing = [
        f"{_amount(name, amount)} (the most that a node has left: {_amount(name, lacks[name])})"
        for name, amount in total.items()
        if lacks[name] < amount
    ]
    where = f" on a node with {_labels(group.room)}" if group.room.labels else ""
    ranks = f" for its {group.room.num_ranks} ranks" if group.room.num_ranks > 1 else ""
    return f"there is room for {placed} of {group.count} {group.name} workers; each needs{where}{ranks} " + (
        " and ".join(missing) or _together(total)
    )


def _together(amounts: Resources) -> str:
    *others, last = (_amount(name, amount) for name, amount in amounts.items())
    return f"{', '.join(others)} and {last}, which no node has left together"


def _amount(name: str, amount: float) -> str:
    return f"{amount / (1 << 20):,.0f} MiB of memory" if name == "memory" else f"{amount:g} {name}"


def _labels(room: Room) -> str:
    return " and ".join(f"the label {key}={value}" for key, value in room.labels)


def _seen(nodes: Sequence[Node], room: Room) -> str:
    keys = [key for key, _ in room.labels]
    seen = sorted({f"{key}={node.labels[key]}" for node in nodes for key in keys if key in node.labels})
    return f"; the nodes have {', '.join(seen)}" if seen else f"; no node has a label {' or '.join(keys)}"
