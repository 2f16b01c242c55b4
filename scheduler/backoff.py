"""How long a worker that crashed waits before it is started again."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 60.0
HEALTHY_S = 60.0


@dataclass(slots=True)
class RestartBackoff:
    """1 s, 2 s, 4 s, … up to a minute; from the beginning after a minute of health. A crash loop does not spin."""

    _num_failures: int = 0

    def delay_after(self, healthy_s: float) -> float:
        """The process has ended, ``healthy_s`` after it had registered (0 if it never had)."""
        if healthy_s >= HEALTHY_S:
            self._num_failures = 0
        delay_s = min(FIRST_DELAY_S * 2.0**self._num_failures, MAX_DELAY_S)
        self._num_failures += 1
        return delay_s
