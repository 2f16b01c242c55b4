"""What workers take of the nodes of a cluster that was joined, and what is refused about it."""

from __future__ import annotations

from typing import Any

import pytest

from engine.cluster_room import check_room, device_of_cluster, rooms_in_cluster
from engine.config import ServeConfig, load_config
from kvcache.errors import ResourceError
from scheduler.room import Node, Room
from scheduler.types import WorkerRole
from workers.device import Device

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
MEBIBYTE = 1 << 20


def node(name: str, cpus: int, mebibytes: int = 8192, labels: dict[str, str] | None = None, **more: float) -> Node:
    return Node(name, f"{name}.test", {"CPU": cpus, "memory": mebibytes * MEBIBYTE, **more}, labels or {})


def joined(**flags: Any) -> ServeConfig:
    return load_config({"address": "auto"} | flags)


def check(config: ServeConfig, nodes: list[Node], worker_mebibytes: int = 1000, device: Device = "cpu") -> None:
    check_room(config, nodes, rooms(config, nodes, worker_mebibytes * MEBIBYTE, device))


def rooms(config: ServeConfig, nodes: list[Node], worker_bytes: int, device: Device = "cpu") -> dict[WorkerRole, Room]:
    return rooms_in_cluster(config, device, nodes, dict.fromkeys(WorkerRole, worker_bytes))


def threads(config: ServeConfig, nodes: list[Node], worker_mebibytes: int = 1000) -> dict[str, float]:
    """Of each rank, by role."""
    found = rooms(config, nodes, worker_mebibytes * MEBIBYTE)
    check_room(config, nodes, found)
    return {role.value: dict(room.resources)["CPU"] for role, room in found.items()}


def test_a_worker_takes_threads_memory_resources_and_a_gpu() -> None:
    config = joined(threads_per_worker="4", decode_resource=["bandwidth_heavy=1"], decode_node_label=["tier=b"])
    room = rooms(config, [], 100, "cuda")[DECODE]
    assert dict(room.resources) == {"CPU": 4.0, "memory": 100.0, "GPU": 1.0, "bandwidth_heavy": 1.0}
    assert room.labels == (("tier", "b"),)


def test_ranks_share_a_worker_s_memory_and_threads() -> None:
    room = rooms(joined(tensor_parallel_size="4", threads_per_worker="8"), [], 1001)[DECODE]
    assert (room.num_ranks, dict(room.resources)) == (4, {"CPU": 2.0, "memory": 251.0})


def test_threads_that_were_not_given_are_what_the_nodes_allow() -> None:
    config = joined(decode_workers="3")
    assert threads(config, [node("a", 8), node("b", 8)]) == {"prefill": 4, "decode": 4}
    with pytest.raises(ResourceError, match=r"room for 1 of 3 decode workers; each needs 1 CPU"):
        threads(config, [node("a", 1), node("b", 1)])


SHARES: dict[str, tuple[dict[str, Any], list[Node], dict[str, float]]] = {
    "nodes with the label": (
        {"node_label": ["tier=w"]},
        [node("large", 32), node("a", 4, labels={"tier": "w"}), node("b", 4, labels={"tier": "w"})],
        {"prefill": 4, "decode": 4},
    ),
    "nodes with the resource": (
        {"resource": ["bw=1"]},
        [node("large", 32), node("b", 4, bw=2.0)],
        {"prefill": 2, "decode": 2},
    ),
    "nodes of its own for each pool": (
        {"prefill_node_label": ["tier=p"], "decode_node_label": ["tier=d"], "decode_workers": "2"},
        [node("a", 32, labels={"tier": "p"}), node("b", 8, labels={"tier": "d"})],
        {"prefill": 32, "decode": 4},
    ),
    "a node of one pool, and one of both": (
        {"prefill_workers": "4", "decode_workers": "1", "decode_node_label": ["tier=d"]},
        [node("a", 8), node("b", 4, labels={"tier": "d"})],
        {"prefill": 2, "decode": 4},
    ),
    "nodes with the memory": ({}, [node("large", 32, 900), node("b", 4)], {"prefill": 2, "decode": 2}),
    "ranks together on a node": (
        {"tensor_parallel_size": "3"},
        [node("a", 8), node("b", 8)],
        {"prefill": 2, "decode": 2},
    ),
}


@pytest.mark.parametrize("case", SHARES)
def test_cores_are_shared_out_among_those_whom_the_nodes_suit(case: str) -> None:
    flags, nodes, shares = SHARES[case]
    assert threads(joined(**flags), nodes) == shares


def test_auto_is_a_gpu_where_the_cluster_has_one_for_each_worker() -> None:
    assert [device_of_cluster(joined(), number) for number in (0, 1, 2)] == ["cpu", "cpu", "cuda"]
    assert device_of_cluster(joined(device="cuda"), 0) == "cuda"
    of_ranks = joined(decode_tensor_parallel_size="2")
    assert [device_of_cluster(of_ranks, number) for number in (2, 3)] == ["cpu", "cuda"]


def test_the_ranks_of_a_worker_have_a_gpu_each_on_one_node() -> None:
    config = joined(decode_tensor_parallel_size="2", threads_per_worker="2", device="cuda")
    room = rooms(config, [], 100, "cuda")[DECODE]
    assert (room.num_ranks, room.total["GPU"]) == (2, 2.0)
    check_room(config, [node("a", 4, GPU=2.0)], {DECODE: room})
    with pytest.raises(
        ResourceError, match=r"each needs for its 2 ranks 2 GPU \(the most that a node has left: 1 GPU\)"
    ):
        check_room(config, [node("a", 4, GPU=1.0), node("b", 4, GPU=1.0)], {DECODE: room})


REFUSED: dict[str, tuple[dict[str, Any], list[Node], str]] = {
    "no node for a role": (
        {"decode_node_label": ["tier=fast"]},
        [node("a", 4, labels={"tier": "slow"})],
        "(asked for by --decode-node-label): no node has the label tier=fast, which the decode workers need;"
        " the nodes have tier=slow",
    ),
    "a model that fits no node": (
        {},
        [node("a", 4, 900)],
        "1,000 MiB of memory (the most that a node has left: 900",
    ),
    "too few of a resource": (
        {"prefill_workers": "3", "prefill_resource": ["compute_heavy=1"], "threads_per_worker": "1"},
        [node("a", 8, compute_heavy=2.0)],
        "there is room for 2 of 3 prefill workers; each needs 1 compute_heavy",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_cluster_lacks_is_said_with_how_much(case: str) -> None:
    flags, nodes, words = REFUSED[case]
    with pytest.raises(ResourceError) as caught:
        check(joined(**flags), nodes)
    assert words in str(caught.value)


def test_a_cluster_with_room_is_taken() -> None:
    check(joined(decode_workers="2"), [node("a", 4), node("b", 4)])
