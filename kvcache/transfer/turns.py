"""Who is next, where many transfers share a few places."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

Grant = Callable[[int], None]


class Turns:
    """Gives each of the places 0 to ``num_places - 1`` to one at a time, to those that wait in the order in which
    they asked. Belongs to one event loop."""

    def __init__(self, num_places: int, num_spare: int = 0) -> None:
        """``num_spare`` more places take the stead of those whose holders are stuck."""
        self._free = list(reversed(range(num_places)))  # the one that was free last is taken first
        self._spare = list(range(num_places, num_places + num_spare))
        self._stuck: set[int] = set()
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

    def get_stuck(self, place: int) -> None:
        """Whoever has it keeps it, and others get a spare place for it, if there is one."""
        if place not in self._stuck and self._spare:
            self._stuck.add(place)
            self.give_back(self._spare.pop())

    def give_back(self, place: int) -> None:
        if place in self._stuck:
            self._stuck.remove(place)
            self._spare.append(place)
        elif self._waiting:
            self._waiting.popleft()(place)
        else:
            self._free.append(place)
