"""Pools that scale by themselves: asks the scheduler's view, tells the fleet how many, and Ray what for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from scheduler.autoscaler import PoolLimits, PoolScaler, PoolView
from scheduler.room import Room
from scheduler.types import ClusterSnapshot, WorkerRole

INTERVAL_S = 2.0
logger = logging.getLogger(__name__)


class Autoscaling:
    """Called by the fleet with every new view of the cluster.

    Args:
        targets: seconds that a pool's latency shall keep: TTFT of prefill, TPOT of decode workers.
        request_nodes: asks Ray for room for so many workers in all; nodes that nobody asks for may be taken away.
    """

    def __init__(
        self,
        limits: Mapping[WorkerRole, PoolLimits],
        targets: Mapping[WorkerRole, float],
        request_nodes: Callable[[Sequence[Room]], None],
    ) -> None:
        self._scalers = {role: PoolScaler(limit) for role, limit in limits.items()}
        self._targets = targets
        self._request_nodes = request_nodes
        self._next_s = 0.0
        self._requested: list[Room] = []

    def decide(self, cluster: ClusterSnapshot, counts: Mapping[WorkerRole, int], now: float) -> dict[WorkerRole, int]:
        """The pools to change, and how many workers each shall have. ``counts``: as many as were asked for."""
        if now < self._next_s:
            return {}
        self._next_s = now + INTERVAL_S
        changes = {}
        for load in cluster.pools:
            scaler = self._scalers.get(load.role)
            if scaler is None:
                continue
            view = PoolView(counts[load.role], load.latency_s, self._targets[load.role], load.busyness)
            wanted = scaler.decide(view, now)
            if wanted != counts[load.role]:
                reason = f"latency {load.latency_s:.2g} s, target {view.target_s:g} s, busy {load.busyness:.0%}"
                logger.info("Scaling %s workers from %d to %d (%s)", load.role.value, view.num_workers, wanted, reason)
                changes[load.role] = wanted
        return changes

    def request(self, rooms: Sequence[Room]) -> None:
        """Asks Ray for what all workers take, when that has changed."""
        if list(rooms) != self._requested:
            self._requested = list(rooms)
            self._request_nodes(rooms)

    def close(self) -> None:
        """Asks for nothing any more: Ray keeps the last request even when we are gone."""
        self._request_nodes(())
