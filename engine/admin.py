"""What an operator may ask of a running cluster; ``engine.api.admin`` is its HTTP side."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat

from engine.fleet import Fleet
from engine.machine_limits import available_memory_bytes
from engine.scheduler_client import SchedulerPort
from kvcache.errors import RequestError
from scheduler.events import ActivateWorker, ChangeRole, DrainWorker, Event, RefuseDuty
from scheduler.room import Node, Room, Wanted, find_shortage
from scheduler.types import ClusterSnapshot, WorkerRole


class Operator:
    """Implements ``engine.api.admin.ClusterAdmin``: duties are the scheduler's, numbers of workers the fleet's."""

    def __init__(
        self,
        scheduler: SchedulerPort,
        fleet: Fleet,
        cluster: Callable[[], ClusterSnapshot],
        worker_bytes: Mapping[WorkerRole, int],
        rooms: Mapping[WorkerRole, Room],
        nodes: Callable[[], Sequence[Node]] | None,
    ) -> None:
        """
        Args:
            worker_bytes: of this machine's memory for one more worker; empty where Ray books memory.
            rooms: what one more worker takes of a node.
            nodes: those that there are; None where Ray adds more for workers that wait.
        """
        self._scheduler = scheduler
        self._fleet = fleet
        self._view = cluster
        self._worker_bytes = worker_bytes
        self._rooms = rooms
        self._nodes = nodes

    @property
    def cluster(self) -> ClusterSnapshot:
        return self._view()

    async def drain(self, worker_id: str, *, force: bool, move_after_s: float | None) -> None:
        """
        Raises:
            RequestError: there is no such worker, or nobody else takes its phase.
            UnavailableError: the scheduler is away.
        """
        await self._order(DrainWorker(worker_id, force, move_after_s))

    async def activate(self, worker_id: str) -> None:
        """Raises as ``drain``."""
        await self._order(ActivateWorker(worker_id))

    async def change_role(self, worker_id: str, role: WorkerRole, move_after_s: float | None) -> None:
        """Raises as ``drain``."""
        await self._order(ChangeRole(worker_id, role, move_after_s))

    async def scale(self, counts: dict[WorkerRole, int]) -> None:
        """
        Raises:
            RequestError: as ``Fleet.scale``, or this machine has no memory, or the cluster no room, for so many.
        """
        await asyncio.to_thread(self._scale, counts)

    def _scale(self, counts: dict[WorkerRole, int]) -> None:
        more = {role: max(0, count - self._fleet.num_workers(role)) for role, count in counts.items()}
        self._check_memory(more)
        if self._nodes is not None and any(more.values()):
            self._check_room(counts, self._nodes())
        self._fleet.scale(counts)

    def _check_memory(self, more: Mapping[WorkerRole, int]) -> None:
        needed = sum(self._worker_bytes.get(role, 0) * number for role, number in more.items())
        available = available_memory_bytes()
        if needed > available:
            raise RequestError(
                f"{sum(more.values())} more workers need {needed >> 20:,} MiB of memory and {available >> 20:,} MiB are"
                " available"
            )

    def _check_room(self, counts: Mapping[WorkerRole, int], nodes: Sequence[Node]) -> None:
        """Workers that have changed their role keep the room that they have."""
        present = [member.options for member in list(self._fleet.members.values()) if not member.is_leaving]
        wanted: Counter[tuple[WorkerRole, Room]] = Counter()
        for role, room in self._rooms.items():
            rooms = [options.room for options in present if options.role is role]
            count = counts.get(role, len(rooms))
            wanted.update((role, each) for each in [*rooms, *repeat(room, count)][:count])
        shortage = find_shortage(nodes, [Wanted(role.value, count, room) for (role, room), count in wanted.items()])
        if shortage is not None:
            raise RequestError(f"the cluster cannot hold so many workers: {shortage}")

    async def _order(self, event: Event) -> None:
        (commands,) = await self._scheduler.handle([event])
        for command in commands:
            if isinstance(command, RefuseDuty):
                raise RequestError(command.message)
