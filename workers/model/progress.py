"""What a long preparation step shows: a bar on a terminal, one line per step elsewhere, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class Progress:
    """Writes to standard error only, so that a command's own output stays clean.

    ``enabled=False`` shows nothing at all.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.on_terminal = enabled and sys.stderr.isatty()

    def step(self, sentence: str) -> None:
        """One line: what is being done now."""
        if self.enabled:
            print(sentence, file=sys.stderr, flush=True)

    def over(self, items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
        """Passes ``items`` through; on a terminal a bar counts them up to ``total``."""
        return iter(tqdm(items, total=total, desc=label, file=sys.stderr, disable=not self.on_terminal, leave=False))
