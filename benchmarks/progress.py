"""Progress of a run: a bar on a terminal, one line per 10 % elsewhere.

Drawn by the measuring loop itself, a few times a second at most: no thread of the bar's own takes the
interpreter lock in the middle of a measurement.
"""

from __future__ import annotations

from typing import TextIO

from tqdm import tqdm

REDRAW_INTERVAL_S = 0.25


class Progress:
    """Counts answers. ``now_s`` is seconds since the run began."""

    def __init__(self, output: TextIO, total: int) -> None:
        tqdm.monitor_interval = 0  # no monitoring thread
        self._output = output
        self._total = total
        self._done = 0
        self._failed = 0
        self._shown_tenths = 0
        is_terminal = output.isatty()
        self._bar = tqdm(
            total=total,
            desc="requests",
            file=output,
            mininterval=REDRAW_INTERVAL_S,
            disable=not is_terminal,
        )

    def advance(self, *, failed: bool, now_s: float) -> None:
        """One more request was answered or failed."""
        self._done += 1
        self._failed += failed
        if self._bar.disable:
            self._draw_line(now_s)
            return
        self._bar.set_postfix(failed=self._failed, refresh=False)
        self._bar.update()
        if self._done == self._total:
            self._bar.close()

    def _draw_line(self, now_s: float) -> None:
        tenths = 10 * self._done // self._total
        if tenths > self._shown_tenths:
            self._shown_tenths = tenths
            status = f"{self._done}/{self._total} requests, {self._failed} failed, {now_s:.1f} s"
            self._output.write(f"{10 * tenths:3d} %  {status}\n")
            self._output.flush()
