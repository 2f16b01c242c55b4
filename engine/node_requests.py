"""What Ray's autoscaler is asked for, by all servers of a Ray cluster together.

Ray keeps one request for the whole cluster, and each replaces the one before. So the servers that scale by themselves
tell what they need to one actor, which asks for the sum. It belongs to the server that started it; when that one ends,
the next that tells something starts another, and until all have told theirs again, some seconds later, Ray is asked for
less. That ends no node: Ray waits minutes before it takes an idle one away, and those of running workers are not idle.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scheduler.room import Room

ACTOR_NAME, NAMESPACE = "node-requests", "twinpool-shared"
EXPIRY_S = 60.0  # of a server that tells nothing any more
CLOSE_TIMEOUT_S = 5.0


def request_nodes(rooms: Sequence[Room]) -> None:
    """Asks for room for all these workers at once, whatever runs; without an autoscaler nothing happens."""
    bundles = [room.total for room in rooms]
    request_resources(bundles=bundles, bundle_label_selectors=[dict(room.labels) for room in rooms])


class NodeRequests:
    """The actor. Each server tells all that it needs, again and again; nothing, when it ends."""

    def __init__(
        self,
        ask: Callable[[Sequence[Room]], None] = request_nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._rooms: dict[str, tuple[Room, ...]] = {}  # by server
        self._told_at_s: dict[str, float] = {}
        self._asked: list[Room] | None = None

    def tell(self, server: str, rooms: tuple[Room, ...]) -> None:
        now = self._clock()
        self._rooms[server], self._told_at_s[server] = rooms, now
        for name, told_at_s in tuple(self._told_at_s.items()):
            if now - told_at_s > EXPIRY_S or not self._rooms[name]:
                del self._rooms[name], self._told_at_s[name]
        wanted = [room for name in sorted(self._rooms) for room in self._rooms[name]]
        if wanted != self._asked:
            self._ask(wanted)
            self._asked = wanted


class SharedNodeRequests:
    """One server's side. Used by one thread at a time; never waits, but at the end."""

    def __init__(self) -> None:
        self._server = ray.get_runtime_context().namespace
        self._actor: Any = None
        self._telling: ray.ObjectRef[None] | None = None

    def tell(self, rooms: Sequence[Room]) -> None:
        """Lost when the actor has ended meanwhile: what matters is told again."""
        if self._actor is None or self._is_lost():
            self._actor = _find_or_start()
        self._telling = self._actor.tell.remote(self._server, tuple(rooms))

    def close(self) -> None:
        """Needs nothing any more. Ray keeps what was asked for last even when all servers are gone."""
        if self._telling is None:
            return
        self.tell(())
        with contextlib.suppress(RayError):
            ray.get(self._telling, timeout=CLOSE_TIMEOUT_S)

    def _is_lost(self) -> bool:
        if self._telling is None or not ray.wait([self._telling], timeout=0)[0]:
            return False
        try:
            ray.get(self._telling)
        except RayError:
            return True
        return False


def _find_or_start() -> Any:
    """On the caller's node, as the scheduler (``start_scheduler``)."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    placed: Any = ray.remote(NodeRequests).options(
        name=ACTOR_NAME, namespace=NAMESPACE, get_if_exists=True, num_cpus=0, scheduling_strategy=here
    )
    return placed.remote()
