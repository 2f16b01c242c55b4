"""Bytes that a process holds right now, freed memory that its allocator keeps for later not among them."""

from __future__ import annotations

import ctypes
from pathlib import Path


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc's malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def buffer_bytes() -> int:
    """Allocated by ``malloc``, all arenas, and mapped from other processes."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo
    info = mallinfo2()
    return int(info.uordblks) + int(info.hblkhd) + _shared_bytes()


def _shared_bytes() -> int:
    """Of shared memory, as far as this process has touched it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("RssShmem:"))
    return int(line.split()[1]) * 1024
