"""How much per second something does, from what it did lately."""

from __future__ import annotations

MEMORY = 0.9  # what an earlier measurement still counts when a new one comes


class Rate:
    """A mean over time that forgets slowly."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    @property
    def per_second(self) -> float | None:
        """None: nothing was measured."""
        return self._amount / self._seconds if self._seconds > 0 else None

    def add(self, amount: float, seconds: float) -> None:
        self._amount = MEMORY * self._amount + amount
        self._seconds = MEMORY * self._seconds + seconds

    def doubt(self) -> None:
        """It was not used because it is slow: it counts as a little quicker, so that it is measured again one day."""
        self._seconds *= MEMORY
