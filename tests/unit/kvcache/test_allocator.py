"""Bytes that are filled after they were made."""

from __future__ import annotations

import gc

from kvcache.transfer.allocator import bytes_to_fill


def test_what_is_written_through_the_view_is_what_the_bytes_are() -> None:
    data, view = bytes_to_fill(5)
    view[:] = b"abcde"
    assert (type(data), data, hash(data)) == (bytes, b"abcde", hash(b"abcde"))


def test_the_view_keeps_the_bytes() -> None:
    data, view = bytes_to_fill(1 << 16)
    view[:] = bytes(range(256)) * 256
    part = view[256:512]
    del data, view
    gc.collect()
    others = [bytes(1 << 16) for _ in range(20)]  # would be put where the first was
    assert part == bytes(range(256)) and others


def test_bytes_are_made_anew_each_time() -> None:
    """But for none and one, which Python has only once of each kind; nobody asks for so few."""
    first, view = bytes_to_fill(100)
    view[:] = b"x" * 100
    second, other = bytes_to_fill(100)
    other[:] = b"y" * 100
    assert first == b"x" * 100 != second
