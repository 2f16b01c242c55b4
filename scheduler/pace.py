"""How fast a kind of work gets done while there is some: measured, never assumed."""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY_S = 30.0  # busy seconds after which what was seen counts a third


@dataclass(slots=True)
class Pace:
    """Amounts over busy seconds, old ones fading. Of idle time it knows nothing."""

    _amount: float = 0.0
    _busy_s: float = 0.0
    _since_s: float | None = None  # busy since, as far as not counted yet

    def begin(self, now: float) -> None:
        """There is work. Harmless when there was some already."""
        if self._since_s is None:
            self._since_s = now

    def done(self, amount: float, now: float, *, is_over: bool) -> None:
        """So much of it is done, and perhaps nothing is left."""
        if self._since_s is None:
            return
        seconds = now - self._since_s
        fade = _MEMORY_S / (_MEMORY_S + seconds)
        self._amount = self._amount * fade + amount
        self._busy_s = self._busy_s * fade + seconds
        self._since_s = None if is_over else now

    def seconds_for(self, amount: float) -> float:
        """How long that much will take; 0 before anything is known."""
        return amount * self._busy_s / self._amount if self._amount > 0 else 0.0
