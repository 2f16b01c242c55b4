"""What each worker takes of its node, and whether the nodes have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.config import ServeConfig, flag_of
from engine.machine_limits import usable_cores
from kvcache.errors import ResourceError
from scheduler.room import Node, Room, Wanted, find_shortage, largest_share
from scheduler.types import WorkerRole
from workers.device import Device

OWN_CPU = 0.01  # of Ray's CPUs: on a machine of our own the threads are shared out by us, and Ray must refuse nobody


def device_of_cluster(config: ServeConfig, num_gpus: int) -> Device:
    """``auto`` is a GPU where the cluster has one for each rank of each worker."""
    if config.device == "auto":
        return "cuda" if num_gpus >= config.num_ranks else "cpu"
    return config.device


def threads_per_rank(config: ServeConfig, role: WorkerRole, nodes: Sequence[Node] | None) -> int:
    """Those given, or this machine's cores, or the cluster's (``nodes``) shared out equally.

    Raises:
        ResourceError: the cluster has fewer cores than ranks.
    """
    if config.threads_per_worker is not None:
        return config.threads_per_worker // config.tensor_parallel_size_of(role)
    if nodes is None:
        return max(1, usable_cores() // config.num_ranks)
    share = largest_share(nodes, config.num_ranks)
    if share == 0:
        cores = sum(int(node.resources.get("CPU", 0)) for node in nodes)
        raise ResourceError(
            f"The cluster has {cores} CPUs on {len(nodes)} nodes and the workers need one for each of"
            f" {config.num_ranks} ranks; start fewer workers."
        )
    return share


def own_room(config: ServeConfig, role: WorkerRole, device: Device) -> Room:
    """In a cluster of our own on this machine, whose memory was checked as a whole."""
    return Room(config.tensor_parallel_size_of(role), (("CPU", OWN_CPU), *_gpu(device)))


def room_in_cluster(
    config: ServeConfig, role: WorkerRole, device: Device, nodes: Sequence[Node], worker_bytes: int
) -> Room:
    """In a cluster that others use too: all that the worker takes is booked, memory included."""
    num_ranks = config.tensor_parallel_size_of(role)
    resources = (
        ("CPU", float(threads_per_rank(config, role, nodes))),
        ("memory", float(-(-worker_bytes // num_ranks))),
        *_gpu(device),
        *config.resources_of(role),
    )
    return Room(num_ranks, resources, config.node_labels_of(role))


def check_room(config: ServeConfig, nodes: Sequence[Node], rooms: Mapping[WorkerRole, Room]) -> None:
    """
    Raises:
        ResourceError: says what is missing in the cluster, and how much.
    """
    wanted = [Wanted(role.value, config.num_workers_of(role), room) for role, room in rooms.items()]
    shortage = find_shortage(nodes, wanted)
    if shortage is not None:
        options = sorted({flag_of(config.option_of(role, "node_label")) for role in rooms if rooms[role].labels})
        asked_by = f" (asked for by {', '.join(options)})" if options else ""
        raise ResourceError(f"The cluster cannot hold the workers{asked_by}: {shortage}.")


def _gpu(device: Device) -> tuple[tuple[str, float], ...]:
    return (("GPU", 1.0),) if device == "cuda" else ()
