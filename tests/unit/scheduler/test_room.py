"""What a cluster lacks is said in one sentence, with how much; what it has is found."""

from __future__ import annotations

import pytest

from scheduler.room import Node, Room, Wanted, find_shortage, largest_share

GIB = float(1 << 30)


def node(name: str, cpus: float = 4, memory: float = 8 * GIB, **more: float) -> Node:
    return Node(name, f"{name}.test", {"CPU": cpus, "memory": memory, **more}, {"tier": name})


def room(cpus: float = 2, *, num_ranks: int = 1, labels: dict[str, str] | None = None, **more: float) -> Room:
    return Room(num_ranks, (("CPU", cpus), *more.items()), tuple((labels or {}).items()))


def test_workers_that_fit_are_not_complained_of() -> None:
    wanted = [Wanted("prefill", 2, room()), Wanted("decode", 2, room())]
    assert find_shortage([node("a"), node("b")], wanted) is None


def test_the_one_that_fits_one_node_only_is_placed_first() -> None:
    """First come first served would fill the only node with a GPU."""
    wanted = [Wanted("prefill", 2, room(4)), Wanted("decode", 1, room(4, GPU=1))]
    assert find_shortage([node("a", GPU=1), node("b"), node("c")], wanted) is None


def test_too_few_nodes_are_told_by_how_many_workers_fit() -> None:
    shortage = find_shortage([node("a")], [Wanted("decode", 3, room())]) or ""
    assert "room for 2 of 3 decode workers" in shortage
    assert "2 CPU (the most that a node has left: 0 CPU)" in shortage


def test_a_model_that_fits_no_node_is_told_by_its_memory() -> None:
    shortage = find_shortage([node("a"), node("b")], [Wanted("prefill", 1, room(memory=9 * GIB))]) or ""
    assert "9,216 MiB of memory (the most that a node has left: 8,192 MiB of memory)" in shortage


def test_the_ranks_of_a_worker_are_on_one_node() -> None:
    group = room(num_ranks=3)
    assert find_shortage([node("a"), node("b")], [Wanted("decode", 1, group)]) is not None
    assert find_shortage([node("a", cpus=6)], [Wanted("decode", 1, group)]) is None
    assert "for its 3 ranks 6 CPU" in (find_shortage([node("a")], [Wanted("decode", 1, group)]) or "")


def test_resources_that_no_single_node_has_together_are_told_so() -> None:
    nodes = [node("a", cpus=1, GPU=1), node("b", cpus=8)]
    shortage = find_shortage(nodes, [Wanted("decode", 1, room(2, memory=GIB, GPU=1))]) or ""
    assert shortage.endswith("each needs 2 CPU, 1,024 MiB of memory and 1 GPU, which no node has left together")


@pytest.mark.parametrize(
    ("key", "seen"), [("tier", "the nodes have tier=a, tier=b"), ("zone", "no node has a label zone")]
)
def test_an_unknown_label_is_told_with_those_that_there_are(key: str, seen: str) -> None:
    shortage = find_shortage([node("a"), node("b")], [Wanted("decode", 1, room(labels={key: "x"}))]) or ""
    assert f"no node has the label {key}=x" in shortage
    assert seen in shortage


def test_a_label_with_too_little_room_is_named() -> None:
    shortage = find_shortage([node("a", cpus=1), node("b")], [Wanted("decode", 1, room(labels={"tier": "a"}))]) or ""
    assert "on a node with the label tier=a" in shortage


@pytest.mark.parametrize(
    ("cpus", "num_ranks", "share"),
    [((4,), 2, 2), ((2, 2), 3, 1), ((4, 1), 2, 2), ((3, 3), 2, 3), ((1,), 2, 0), ((), 1, 0)],
)
def test_cores_are_shared_out_as_far_as_nodes_allow(cpus: tuple[int, ...], num_ranks: int, share: int) -> None:
    assert largest_share([node(str(index), cpus=count) for index, count in enumerate(cpus)], num_ranks) == share
