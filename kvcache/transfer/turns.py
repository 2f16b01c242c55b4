"""Who is next, where many transfers share a few places."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

Grant = Callable[[int], None]


class Turns:
    """Gives each of the places 0 to ``num_places - 1`` to one at a time, to those that wait in the order in which
    they asked. Belongs to one event loop."""

    def __init__(self, num_places: int) -> None:
        self._free = list(reversed(range(num_places)))  # the one that was free last is taken first
        self._waiting: deque[Grant] = deque()

    def ask(self, grant: Grant) -> None:
        """Calls ``grant`` with a place once there is one, maybe at once."""
        if self._free:
            grant(self._free.pop())
        else:
            self._waiting.append(grant)

    def forget(self, grant: Grant) -> None:
        """Takes back what was asked and not granted yet."""
        self._waiting.remove(grant)

    def give_back(self, place: int) -> None:
        if self._waiting:
            self._waiting.popleft()(place)
        else:
            self._free.append(place)
