"""Memory for messages: the C allocator's way with it, and bytes that are filled after they were made."""

from __future__ import annotations

import ctypes

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, (ctypes.c_char_p, ctypes.c_ssize_t)
_address_of = ctypes.pythonapi.PyBytes_AsString
_address_of.restype, _address_of.argtypes = ctypes.c_void_p, (ctypes.py_object,)

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


def bytes_to_fill(num_bytes: int) -> tuple[bytes, memoryview]:
    """New bytes of any content, and a view to write it through, which keeps them alive.

    For who takes nothing but ``bytes``, so that a message need not be put together from parts and so be copied. The
    C interface of Python allows it until somebody else has seen them: nothing is written once they are given away.
    """
    data = _new_bytes(None, num_bytes)
    array = (ctypes.c_char * num_bytes).from_address(_address_of(data))
    array.data = data  # type: ignore[attr-defined]  # the view holds the array
    return data, memoryview(array).cast("B")
