"""What workers take of the nodes of a cluster that was joined, and what is refused about it."""

from __future__ import annotations

from typing import Any

import pytest

from engine.cluster_room import check_room, device_of_cluster, room_in_cluster, threads_per_rank
from engine.config import ServeConfig, load_config
from kvcache.errors import ResourceError
from scheduler.room import Node
from scheduler.types import WorkerRole
from workers.device import Device

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
MEBIBYTE = 1 << 20


def node(name: str, cpus: int, mebibytes: int = 8192, labels: dict[str, str] | None = None, **more: float) -> Node:
    return Node(name, f"{name}.test", {"CPU": cpus, "memory": mebibytes * MEBIBYTE, **more}, labels or {})


def joined(**flags: Any) -> ServeConfig:
    return load_config({"address": "auto"} | flags)


def check(config: ServeConfig, nodes: list[Node], worker_mebibytes: int = 1000, device: Device = "cpu") -> None:
    rooms = {
        role: room_in_cluster(config, role, device, nodes, worker_mebibytes * MEBIBYTE)
        for role in WorkerRole
        if config.num_workers_of(role)
    }
    check_room(config, nodes, rooms)


def test_a_worker_takes_threads_memory_resources_and_a_gpu() -> None:
    config = joined(threads_per_worker="4", decode_resource=["bandwidth_heavy=1"], decode_node_label=["tier=b"])
    room = room_in_cluster(config, DECODE, "cuda", [], 100)
    assert dict(room.resources) == {"CPU": 4.0, "memory": 100.0, "GPU": 1.0, "bandwidth_heavy": 1.0}
    assert room.labels == (("tier", "b"),)


def test_ranks_share_a_worker_s_memory_and_threads() -> None:
    room = room_in_cluster(joined(tensor_parallel_size="4", threads_per_worker="8"), DECODE, "cpu", [], 1001)
    assert (room.num_ranks, dict(room.resources)) == (4, {"CPU": 2.0, "memory": 251.0})


def test_threads_that_were_not_given_are_what_the_nodes_allow() -> None:
    config = joined(decode_workers="3")
    assert threads_per_rank(config, DECODE, [node("a", 8), node("b", 8)]) == 4
    with pytest.raises(ResourceError, match="2 CPUs on 2 nodes and the workers need one for each of 4 ranks"):
        threads_per_rank(config, DECODE, [node("a", 1), node("b", 1)])


def test_auto_is_a_gpu_where_the_cluster_has_one_for_each_worker() -> None:
    assert [device_of_cluster(joined(), number) for number in (0, 1, 2)] == ["cpu", "cpu", "cuda"]
    assert device_of_cluster(joined(device="cuda"), 0) == "cuda"
    of_ranks = joined(decode_tensor_parallel_size="2")
    assert [device_of_cluster(of_ranks, number) for number in (2, 3)] == ["cpu", "cuda"]


def test_the_ranks_of_a_worker_have_a_gpu_each_on_one_node() -> None:
    config = joined(decode_tensor_parallel_size="2", threads_per_worker="2", device="cuda")
    room = room_in_cluster(config, DECODE, "cuda", [], 100)
    assert (room.num_ranks, room.total["GPU"]) == (2, 2.0)
    rooms = {DECODE: room}
    check_room(config, [node("a", 4, GPU=2.0)], rooms)
    with pytest.raises(
        ResourceError, match=r"each needs for its 2 ranks 2 GPU \(the most that a node has left: 1 GPU\)"
    ):
        check_room(config, [node("a", 4, GPU=1.0), node("b", 4, GPU=1.0)], rooms)


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
