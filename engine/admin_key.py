"""The key of admin calls: given, or made at the start and kept where only this user reads it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from engine.machine_limits import is_loopback
from workers.model.checkpoint import cache_dir

ENVIRONMENT_VARIABLE = "TWINPOOL_ADMIN_KEY"


def key_file(port: int) -> Path:
    return cache_dir() / "admin" / f"{port}.key"


@contextlib.contextmanager
def admin_key(given: str | None, port: int) -> Iterator[str]:
    """The key of a server on ``port``, for as long as it serves.

    Without a given one it is a new one in a file of the user's, so that commands on this machine find it.
    """
    if given is not None:
        yield given
        return
    file = key_file(port)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # left by a server that was killed
    key = secrets.token_hex(32)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as sink:
        sink.write(key)
    try:
        yield key
    finally:
        file.unlink(missing_ok=True)


def find_key(url: str) -> str | None:
    """The key that a server on this machine has left for us, if ``url`` is one."""
    try:
        place = urlsplit(url)
        port = place.port
    except ValueError:
        return None
    if port is None or not is_loopback(f"{place.hostname}:{port}"):  # the key is for nobody else
        return None
    try:
        return key_file(port).read_text(encoding="ascii")
    except OSError:
        return None
