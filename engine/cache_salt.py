"""Who shares cached KV with whom.

A prompt whose beginning is cached gets its first token sooner, so whoever shares the cache can find out by
guessing what others have asked (CVE-2025-46570). Therefore different tenants do not share, nor do callers with
different API keys that belong to no tenant, and a client may divide its own requests further with ``cache_salt``.
"""

from __future__ import annotations

import hashlib

ANYBODY = ""


def identity_of_key(api_key: str) -> str:
    """The name under which the holder of a key is known inside; says nothing of the key itself."""
    return "key:" + hashlib.sha256(api_key.encode()).hexdigest()


def identity_of_tenant(name: str) -> str:
    """All keys of one tenant share what is cached."""
    return "tenant:" + name


def make_cache_salt(identity: str, client_salt: str | None) -> bytes:
    """What the workers hash into the names of blocks: at most ``kvcache.prefix.MAX_SALT_BYTES`` bytes.

    Args:
        identity: of the caller; ``ANYBODY`` where no key is asked for.
        client_salt: the request's ``cache_salt``. It divides what the caller has; it cannot reach what others have.
    """
    if identity == ANYBODY and client_salt is None:
        return b""
    parts = (identity.encode(), (client_salt or "").encode())
    # Each part behind its length, so that no two pairs make the same text.
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "little") + part for part in parts)).digest()
