"""An event loop in virtual time."""

from __future__ import annotations

import asyncio
import selectors


class SkippingSelector(selectors.SelectSelector):
    """Nobody waits: the time goes on at once to when somebody would be woken."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class SkippingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._skipping = SkippingSelector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now
