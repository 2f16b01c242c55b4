"""How far the start is: one bar on a terminal, one line per 10 % elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import NoReturn

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_BAR_FORMAT = "{desc}: {percentage:3.0f}% |{bar:30}| {elapsed}"
logger = logging.getLogger(__name__)


class StartProgress:
    """One start, in named stages. Only ``load`` knows how far it is; the others are quick."""

    def __init__(self, on_terminal: bool) -> None:
        self._bar: tqdm[NoReturn] | None = None
        if on_terminal:
            self._bar = tqdm(total=1.0, bar_format=_BAR_FORMAT, file=sys.stderr, leave=False, desc="Starting")
        self._percent_told = 0

    def stage(self, name: str) -> None:
        """Says on a terminal what is being done now."""
        if self._bar is not None:
            self._bar.set_description_str(name)

    def load(self, part: float) -> None:
        """How much of all weights is loaded, from 0 to 1. Called often, so that the time goes on too."""
        if self._bar is not None:
            self._bar.n = part
            self._bar.refresh()
            return
        percent = int(part * 10) * 10
        if percent > self._percent_told:
            self._percent_told = percent
            logger.info("Loading weights: %d %%", percent)

    def close(self) -> None:
        """Takes the bar away; lines stay."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def start_progress() -> Iterator[StartProgress]:
    """For the time of the start; log lines go above the bar."""
    progress = StartProgress(sys.stderr.isatty())
    try:
        with logging_redirect_tqdm():
            yield progress
    finally:
        progress.close()
