"""How a process that serves thousands of requests per second collects garbage."""

from __future__ import annotations

import gc

THRESHOLDS = (10_000, 50, 100)


def collect_rarely() -> None:
    """To be called once, when what stays has been made: it is not looked at again.

    Nearly all of what requests leave behind has no cycles and goes without the collector. By Python's own thresholds
    it took a tenth of the scheduler's time, up to 70 ms at once where 15,000 requests were in flight; now a fiftieth.
    """
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    gc.enable()
