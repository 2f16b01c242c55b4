"""Which blocks hold the KV of which tokens, so that a prefix computed once is computed no more.

KV of a token depends on all tokens before it. So a block is named by a chain of hashes (as in vLLM)::

    salt ─► root ─► block 0 ─────► block 1 ─────► block 2        SHA-256 (parent, token ids of the block)
                    tokens 0…15    tokens 16…31   tokens 32…47

Two sequences with the same hash have the same tokens up to there and the same salt. Whoever must not learn
from the time to the first token what others have asked (CVE-2025-46570) gets a salt of his own. The model
and the layout of the cache are one per worker, and so is the index: they are not hashed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from kvcache.errors import InvariantError

MAX_SALT_BYTES = 32
NAME_BYTES = 8  # so much of a block's name is published: enough to route by, where a wrong guess costs time only
MAX_NEWS = 1 << 16  # kept for a listener that is slow, beside twice what is cached


class HashChain:
    """Hashes of the full blocks of one sequence. It grows with the sequence and hashes every token once."""

    def __init__(self, salt: bytes, block_size: int) -> None:
        self._parent = hashlib.sha256(salt).digest()
        self._block_size = block_size
        self._tokens = struct.Struct(f"<{block_size}I")
        self._hashes: list[bytes] = []

    def hashes(self, token_ids: Sequence[int]) -> Sequence[bytes]:
        """One hash per full block of ``token_ids``, which goes on where an earlier call ended. Do not change it."""
        for start in range(len(self._hashes) * self._block_size, len(token_ids), self._block_size):
            block = token_ids[start : start + self._block_size]
            if len(block) < self._block_size:
                break
            self._parent = hashlib.sha256(self._parent + self._tokens.pack(*block)).digest()
            self._hashes.append(self._parent)
        return self._hashes


@dataclass(frozen=True, slots=True)
class PrefixNews:
    """Hashes that came to an index, and that went."""

    added: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


class PrefixIndex:
    """Hash → the one block that holds this KV, and back. Who owns a block is not known here.

    A block stands here only while its KV is whole: whoever computed or received it puts it in, and
    ``BlockPool`` takes it out when it gives the block to somebody who will write to it.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._news: dict[bytes, bool] | None = None  # what was not told yet, hash → is here; None: nobody listens

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._hash_of

    def __iter__(self) -> Iterator[int]:
        """The indexed blocks."""
        return iter(self._hash_of)

    def name_of(self, block_id: int) -> bytes:
        """The hash of an indexed block."""
        return self._hash_of[block_id]

    def longest_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the first hashes, up to the first that is not here."""
        block_ids = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def add(self, block_hash: bytes, block_id: int) -> None:
        """Enters a block. Another block with the same KV that is here already stays, and this one is left out."""
        known = self._hash_of.get(block_id)
        if known is not None and known != block_hash:
            raise InvariantError(f"block {block_id} is indexed with other tokens already")
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash
            self._note(block_hash, is_here=True)

    def forget(self, block_id: int) -> None:
        """The block's content ends here. Harmless for a block that is not indexed."""
        block_hash = self._hash_of.pop(block_id, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            self._note(block_hash, is_here=False)

    @property
    def tells(self) -> bool:
        """False: nobody asked for news yet, or nobody took them for so long that they were given up."""
        return self._news is not None

    def tell_anew(self) -> None:
        """``take_news`` begins again, with all that is here."""
        self._news = dict.fromkeys(self._block_of, True)

    def take_news(self, limit: int) -> PrefixNews:
        """Up to ``limit`` hashes that came or went since the last call, oldest first.

        Whoever has taken all news since ``tell_anew`` knows what is here.
        """
        unsaid = self._news or {}
        news = {block_hash: unsaid.pop(block_hash) for block_hash in list(islice(unsaid, limit))}
        return PrefixNews(
            tuple(block_hash for block_hash, is_here in news.items() if is_here),
            tuple(block_hash for block_hash, is_here in news.items() if not is_here),
        )

    def _note(self, block_hash: bytes, *, is_here: bool) -> None:
        if self._news is None:
            return
        self._news[block_hash] = is_here
        if len(self._news) > MAX_NEWS + 2 * len(self._block_of):
            self._news = None  # nobody takes them

    def check_integrity(self) -> None:
        """
        Raises:
            InvariantError: a hash and a block do not name each other, or a block stands here twice.
        """
        if {block_id: block_hash for block_hash, block_id in self._block_of.items()} != self._hash_of:
            raise InvariantError("the prefix index and its inverse differ")
        if len(self._block_of) != len(self._hash_of):
            raise InvariantError("a block is in the prefix index twice")
