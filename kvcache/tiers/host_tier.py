"""Records of blocks in the host's memory, least recently used first out, under a limit of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    name: bytes  # of the block in the prefix index
    data: bytes


class HostTier:
    """Owned by one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self.num_bytes = 0
        self.evictions = 0
        self._limit_bytes = limit_bytes
        self._records: OrderedDict[bytes, bytes] = OrderedDict()

    def __contains__(self, name: bytes) -> bool:
        return name in self._records

    def get(self, name: bytes) -> bytes | None:
        """Counts as a use."""
        data = self._records.get(name)
        if data is not None:
            self._records.move_to_end(name)
        return data

    def put(self, record: Record) -> list[Record]:
        """Enters a record; returns those that had to go for it, which may be the record itself."""
        self.remove(record.name)
        self._records[record.name] = record.data
        self.num_bytes += len(record.data)
        evicted = []
        while self.num_bytes > self._limit_bytes:
            name, data = self._records.popitem(last=False)
            self.num_bytes -= len(data)
            evicted.append(Record(name, data))
        self.evictions += len(evicted)
        return evicted

    def newest_first(self) -> Iterator[Record]:
        """The most recently used first. The tier may not change meanwhile."""
        return (Record(name, data) for name, data in reversed(self._records.items()))

    def remove(self, name: bytes) -> None:
        """Harmless for a name that is not here."""
        self.num_bytes -= len(self._records.pop(name, b""))
