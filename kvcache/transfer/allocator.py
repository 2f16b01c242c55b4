"""The C allocator's way with message buffers."""

from __future__ import annotations

import ctypes

KEPT_BYTES = 32 << 20  # the largest that glibc takes for the first of these
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_message_buffers() -> bool:
    """Has the process's allocator use freed memory again, up to ``KEPT_BYTES`` of it, before it is given back.

    By default glibc maps a buffer of a MiB anew for every message, and the kernel fills its 256 pages with zeros: a
    handoff over gRPC then moves a third as much (measured). False: this C library is another one, and nothing changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(name, KEPT_BYTES) == 1 for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    )
