"""Pools that scale by themselves: asks the scheduler's view, tells the fleet how many, and Ray what for."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from scheduler.autoscaler import COOLDOWN_S, PoolLimits, PoolScaler, PoolView
from scheduler.room import Room
from scheduler.types import ClusterSnapshot, WorkerRole

INTERVAL_S = 2.0
TELL_INTERVAL_S = 10.0
logger = logging.getLogger(__name__)


class NodeMarket(Protocol):
    """What ``engine.node_requests.SharedNodeRequests`` offers."""

    def tell(self, rooms: Sequence[Room]) -> None: ...

    def close(self) -> None: ...


class Autoscaling:
    """Called by the fleet with every new view of the cluster.

    Args:
        targets: seconds that a pool's latency shall keep: TTFT of prefill, TPOT of decode workers. A place in either
            pool shall not take longer to get than a first token.
        nodes: hears for how many workers in all there shall be room; nodes that nobody asks for may be taken away.
    """

    def __init__(
        self,
        limits: Mapping[WorkerRole, PoolLimits],
        targets: Mapping[WorkerRole, float],
        nodes: NodeMarket,
    ) -> None:
        self._scalers = {role: PoolScaler(limit) for role, limit in limits.items()}
        self._targets = targets
        self._nodes = nodes
        self._next_s = 0.0
        self._grown_at_s = -math.inf  # any of the pools
        self._told: list[Room] = []
        self._tell_again_s = 0.0

    def decide(
        self, cluster: ClusterSnapshot, counts: Mapping[WorkerRole, int], coming: Mapping[WorkerRole, int], now: float
    ) -> dict[WorkerRole, int]:
        """The pools to change, and how many workers each shall have.

        Args:
            counts: as many as were asked for.
            coming: those of them that start for the first time.
        """
        if now < self._next_s:
            return {}
        self._next_s = now + INTERVAL_S
        changes = {}
        # Where one pool has grown, those that wait or were refused go on; only later it shows whether the other one
        # lacks, too.
        is_settling = now - self._grown_at_s < COOLDOWN_S
        for load in cluster.pools:
            scaler = self._scalers.get(load.role)
            if scaler is None:
                continue
            view = PoolView(
                counts[load.role],
                load.latency_s,
                self._targets[load.role],
                load.busyness,
                coming[load.role],
                0.0 if is_settling else load.wait_s,
                self._targets[WorkerRole.PREFILL],
                0.0 if is_settling else load.refused,
            )
            wanted = scaler.decide(view, now)
            if wanted != counts[load.role]:
                latency = f"latency {load.latency_s:.2g} s, target {view.target_s:g} s"
                waiting = f"waiting {load.wait_s:.2g} s, refused {load.refused:.0%}"
                reason = f"{latency}, {waiting}, busy {load.busyness:.0%}"
                logger.info("Scaling %s workers from %d to %d (%s)", load.role.value, view.num_workers, wanted, reason)
                changes[load.role] = wanted
                if wanted > view.num_workers:
                    self._grown_at_s = now
        return changes

    def request(self, rooms: Sequence[Room], now: float) -> None:
        """Tells what all workers take: at once when that has changed, and now and then, for it may have been lost."""
        if list(rooms) != self._told or now >= self._tell_again_s:
            self._told = list(rooms)
            self._tell_again_s = now + TELL_INTERVAL_S
            self._nodes.tell(rooms)

    def close(self) -> None:
        """Needs nothing any more."""
        self._nodes.close()
