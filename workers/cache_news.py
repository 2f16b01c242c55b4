"""What a worker tells the scheduler of its prefix cache, so that requests come where their prefixes are."""

from __future__ import annotations

from kvcache.prefix import PrefixIndex
from scheduler.cache_index import pack_names
from scheduler.types import CacheDelta

MAX_NAMES = 8192  # in one heartbeat, 64 KiB; the rest comes with the next


class CacheNews:
    """Deltas in a row, the first with all that is cached, as far as it fits. Used on the worker's event loop."""

    def __init__(self, prefixes: PrefixIndex, max_names: int = MAX_NAMES) -> None:
        self._prefixes = prefixes
        self._max_names = max_names
        self._sequence = 0

    def begin_anew(self) -> None:
        """A delta may have been lost: the next one begins a new row."""
        self._prefixes.tell_anew()
        self._sequence = 0

    def take(self) -> CacheDelta | None:
        """The next delta; None when nothing changed."""
        if not self._prefixes.tells:
            self.begin_anew()
        news = self._prefixes.take_news(self._max_names)
        if self._sequence and not news.added and not news.removed:
            return None
        delta = CacheDelta(self._sequence, pack_names(news.added), pack_names(news.removed))
        self._sequence += 1
        return delta
