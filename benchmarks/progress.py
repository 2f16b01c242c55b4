"""Progress of a run: a bar that redraws in place on a terminal, one line per 10 % elsewhere.

Written by the measuring loop itself, a few times a second at most. Bars that refresh from a thread of
their own would take the interpreter lock in the middle of a measurement.
"""

from __future__ import annotations

from typing import TextIO

BAR_WIDTH = 30
REDRAW_INTERVAL_S = 0.25


class Progress:
    """Counts answers. ``now_s`` is any clock in seconds that does not go backwards."""

    def __init__(self, output: TextIO, total: int) -> None:
        self._output = output
        self._total = total
        self._done = 0
        self._failed = 0
        self._on_terminal = output.isatty()
        self._drawn_s = float("-inf")
        self._drawn_tenths = 0

    def advance(self, *, failed: bool, now_s: float) -> None:
        """One more request was answered or failed."""
        self._done += 1
        self._failed += failed
        if self._on_terminal:
            if self._done == self._total or now_s - self._drawn_s >= REDRAW_INTERVAL_S:
                self._drawn_s = now_s
                self._draw_bar(now_s)
        else:
            self._draw_line(now_s)

    def _draw_bar(self, now_s: float) -> None:
        filled = "#" * (BAR_WIDTH * self._done // self._total)
        end = "\n" if self._done == self._total else ""
        self._output.write(f"\r[{filled:<{BAR_WIDTH}}] {self._status(now_s)}{end}")
        self._output.flush()

    def _draw_line(self, now_s: float) -> None:
        tenths = 10 * self._done // self._total
        if tenths > self._drawn_tenths:
            self._drawn_tenths = tenths
            self._output.write(f"{10 * tenths:3d} %  {self._status(now_s)}\n")
            self._output.flush()

    def _status(self, now_s: float) -> str:
        return f"{self._done}/{self._total} requests, {self._failed} failed, {now_s:.1f} s"
