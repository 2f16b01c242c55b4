"""Records of blocks in files, least recently used first out, under a limit of bytes; they survive a restart.

::

    <folder>/<first two digits of the name>/<name>.kv       written as .tmp and renamed, so never found half-written

The index is rebuilt from the files' names. What is in a file is believed after its checksums only.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from kvcache.errors import ResourceError
from kvcache.tiers.host_tier import Record

SUFFIX = ".kv"
TEMPORARY = ".tmp"
NAME_DIGITS = 64


class FileTier:
    """Used by one thread at a time; whoever asks ``in`` from another sees a state that was true a moment ago."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Makes the folder, readable by this user only, and takes over what is in it, up to the limit.

        Raises:
            ResourceError: the folder cannot be used.
        """
        self.num_bytes = 0
        self.evictions = 0
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take_over()
        except OSError as error:
            raise ResourceError(f"The folder {folder} for KV files cannot be used: {error.strerror}.") from error
        self._make_room()

    def __contains__(self, name: bytes) -> bool:
        return name in self._sizes

    def size_of(self, name: bytes) -> int:
        return self._sizes.get(name, 0)

    def read(self, name: bytes) -> bytes | None:
        """Counts as a use, also for the order after a restart. None: not here, or not readable any more."""
        if name not in self._sizes:
            return None
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            self.remove(name)
            return None
        self._sizes.move_to_end(name)
        return data

    def write(self, record: Record) -> None:
        """
        Raises:
            OSError: it could not be written, as on a full disk; nothing is left of it.
        """
        if record.name in self._sizes or len(record.data) > self._limit_bytes:
            return
        path = self._path(record.name)
        temporary = path.with_suffix(TEMPORARY)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            temporary.write_bytes(record.data)
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._sizes[record.name] = len(record.data)
        self.num_bytes += len(record.data)
        self._make_room()

    def write_newest(self, records: Iterable[Record], has_time: Callable[[], bool]) -> int:
        """Takes in what a tier before this one has when it ends: as much of it as there is time and room for.

        Args:
            records: the most recently used first. All are taken for used later than what is here.

        Returns how many are here now.

        Raises:
            OSError: one could not be written; those before it are here.
        """
        kept: list[bytes] = []
        left_bytes = self._limit_bytes
        try:
            for record in records:
                left_bytes -= len(record.data)
                if left_bytes < 0 or not has_time():
                    break
                self.write(record)
                self._touch(record.name)  # or the next one could push it out
                kept.append(record.name)
        finally:
            for name in reversed(kept):
                self._touch(name)
        return len(kept)

    def _touch(self, name: bytes) -> None:
        self._sizes.move_to_end(name)
        with suppress(OSError):  # it is gone, as a read will find
            os.utime(self._path(name))

    def remove(self, name: bytes) -> None:
        """Harmless for a name that is not here."""
        self.num_bytes -= self._sizes.pop(name, 0)
        with suppress(OSError):
            self._path(name).unlink()

    def _make_room(self) -> None:
        while self.num_bytes > self._limit_bytes:
            self.remove(next(iter(self._sizes)))
            self.evictions += 1

    def _take_over(self) -> None:
        found = []
        for path in self._folder.glob("??/*"):
            if path.suffix == TEMPORARY:  # of a process that died while it wrote
                path.unlink(missing_ok=True)
            elif path.suffix == SUFFIX and len(path.stem) == NAME_DIGITS:
                with suppress(ValueError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, bytes.fromhex(path.stem), status.st_size))
        for _, name, size in sorted(found):
            self._sizes[name] = size
            self.num_bytes += size

    def _path(self, name: bytes) -> Path:
        digits = name.hex()
        return self._folder / digits[:2] / f"{digits}{SUFFIX}"
