"""What each worker takes of its node, and whether the nodes have it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from engine.config import ServeConfig, flag_of
from engine.machine_limits import usable_cores
from kvcache.errors import ResourceError
from scheduler.room import Node, Room, Wanted, find_shortage, largest_share, suits
from scheduler.types import WorkerRole
from workers.device import Device

OWN_CPU = 0.01  # of Ray's CPUs: on a machine of our own the threads are shared out by us, and Ray must refuse nobody


def device_of_cluster(config: ServeConfig, num_gpus: int) -> Device:
    """``auto`` is a GPU where the cluster has one for each rank of each worker."""
    if config.device == "auto":
        return "cuda" if num_gpus >= config.num_ranks else "cpu"
    return config.device


def own_threads(config: ServeConfig, role: WorkerRole) -> int:
    """Of each rank in a cluster of our own: those given, or this machine's cores shared out equally."""
    return _given_threads(config, role) or max(1, usable_cores() // config.num_ranks)


def own_room(config: ServeConfig, role: WorkerRole, device: Device) -> Room:
    """In a cluster of our own on this machine, whose memory was checked as a whole."""
    return Room(config.tensor_parallel_size_of(role), (("CPU", OWN_CPU), *_gpu(device)))


def rooms_in_cluster(
    config: ServeConfig, device: Device, nodes: Sequence[Node], worker_bytes: Mapping[WorkerRole, int]
) -> dict[WorkerRole, Room]:
    """In a cluster that others use too: all that a worker takes is booked, memory included.

    Threads that were not given are the cores of the nodes that suit a role, shared out as far as all workers find room.
    Where they do not, whatever their threads, each has one per rank, and ``check_room`` says what is missing.
    """
    roles = [role for role in WorkerRole if config.num_workers_of(role)]

    def rooms(most_threads: int) -> dict[WorkerRole, Room]:
        threads = {role: _given_threads(config, role) or max(1, min(most_threads, shares[role])) for role in roles}
        return {role: _room(config, role, device, threads[role], worker_bytes[role]) for role in roles}

    shares = dict.fromkeys(roles, 1)
    least = rooms(1)
    for role in roles:
        num_ranks = least[role].num_ranks * config.num_workers_of(role)
        shares[role] = largest_share([node for node in nodes if suits(least[role], node)], num_ranks)
    more = range(2, max(shares.values()) + 1)
    return rooms(1 + bisect_left(more, True, key=lambda most: _shortage(config, nodes, rooms(most)) is not None))


def check_room(config: ServeConfig, nodes: Sequence[Node], rooms: Mapping[WorkerRole, Room]) -> None:
    """
    Raises:
        ResourceError: says what is missing in the cluster, and how much.
    """
    shortage = _shortage(config, nodes, rooms)
    if shortage is not None:
        options = sorted({flag_of(config.option_of(role, "node_label")) for role in rooms if rooms[role].labels})
        asked_by = f" (asked for by {', '.join(options)})" if options else ""
        raise ResourceError(f"The cluster cannot hold the workers{asked_by}: {shortage}.")


def _shortage(config: ServeConfig, nodes: Sequence[Node], rooms: Mapping[WorkerRole, Room]) -> str | None:
    return find_shortage(nodes, [Wanted(role.value, config.num_workers_of(role), room) for role, room in rooms.items()])


def _room(config: ServeConfig, role: WorkerRole, device: Device, num_threads: int, worker_bytes: int) -> Room:
    num_ranks = config.tensor_parallel_size_of(role)
    resources = (
        ("CPU", float(num_threads)),
        ("memory", float(-(-worker_bytes // num_ranks))),
        *_gpu(device),
        *config.resources_of(role),
    )
    return Room(num_ranks, resources, config.node_labels_of(role))


def _given_threads(config: ServeConfig, role: WorkerRole) -> int | None:
    """Of each rank."""
    given = config.threads_per_worker
    return None if given is None else given // config.tensor_parallel_size_of(role)


def _gpu(device: Device) -> tuple[tuple[str, float], ...]:
    return (("GPU", 1.0),) if device == "cuda" else ()
