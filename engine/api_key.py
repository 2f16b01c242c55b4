"""What may be an API key, wherever it is configured."""

from __future__ import annotations


def check_api_key(key: str) -> None:
    """An empty key, as of a secret that was not set, must not turn into no key at all.

    Raises:
        ValueError: does not quote the key.
    """
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise ValueError("a key must be printable ASCII, not empty and without spaces around it")
