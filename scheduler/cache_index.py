"""Which workers have which blocks cached, from what they publish: hash → workers.

A block's name stands for all tokens up to its end, so whoever has a deep block of a prompt has, as a rule, those
before it: prefixes are evicted from their ends. So both questions below are answered by halving.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Container, Sequence
from itertools import islice

from kvcache.prefix import NAME_BYTES, HashChain
from scheduler.types import CacheDelta, PrefixHashes, WorkerInfo

MAX_NAMES_PER_WORKER = 1 << 16  # a million tokens in blocks of 16; what a worker says beyond is not kept
MAX_HASHES = 16  # of one prompt and block size: what is cached is known to a sixteenth of the prompt
MAX_HASHED_BLOCKS = 4096  # of one prompt: hashing a block takes two microseconds


class CacheIndex:
    """Holds at most ``MAX_NAMES_PER_WORKER`` names of each worker; says nothing of who is alive."""

    def __init__(self) -> None:
        self._holders: dict[int, dict[str, None]] = {}  # in order of entry: what is chosen must not depend on hashing
        self._names: dict[str, set[int]] = {}
        self._sequences: dict[str, int] = {}  # of the delta taken last

    def apply(self, worker_id: str, delta: CacheDelta) -> bool:
        """Takes a delta over; False, and nothing is known of the worker from then on, when one before it is missing."""
        if delta.sequence == 0:
            self.forget(worker_id)
        elif self._sequences.get(worker_id) != delta.sequence - 1:
            self.forget(worker_id)
            return False
        self._sequences[worker_id] = delta.sequence
        names = self._names.setdefault(worker_id, set())
        for name in unpack_names(delta.removed):
            if name in names:
                names.remove(name)
                self._drop(name, worker_id)
        for name in unpack_names(delta.added):
            if len(names) == MAX_NAMES_PER_WORKER:
                break
            names.add(name)
            self._holders.setdefault(name, {})[worker_id] = None
        return True

    def forget(self, worker_id: str) -> None:
        self._sequences.pop(worker_id, None)
        for name in self._names.pop(worker_id, ()):
            self._drop(name, worker_id)

    def cached_tokens(self, worker: WorkerInfo, prefixes: Sequence[PrefixHashes], num_prompt_tokens: int) -> int:
        """Tokens of a prompt that a worker need not compute, or not be sent. The last one always is.

        Args:
            prefixes: at most one for each block size.
        """
        names = self._names.get(worker.worker_id)
        if not names:
            return 0
        block_size = worker.spec.block_size
        for prefix in prefixes:
            if prefix.block_size == block_size:
                hashes = prefix.hashes
                # As ``_depth``, which is called too often to be a call.
                depth = len(hashes) - bisect_left(hashes, True, key=names.__contains__)
                num_tokens = depth * prefix.tokens_per_hash
                if num_tokens < num_prompt_tokens:
                    return num_tokens
                return (num_prompt_tokens - 1) // block_size * block_size
        return 0

    def deepest(self, prefix: PrefixHashes, limit: int) -> list[str]:
        """Up to ``limit`` workers that have something of the prompt, those with the most of it first."""
        found: list[str] = []
        hashes, holders = prefix.hashes, self._holders
        place = len(hashes) - _depth(hashes, holders)
        # Down by ever longer steps: those who share a system prompt only are seen too, at the price of few looks.
        step = 1
        while place < len(hashes) and len(found) < limit:
            for worker_id in islice(holders.get(hashes[place], ()), limit):
                if worker_id not in found:
                    found.append(worker_id)
            place += step
            step *= 2
        return found[:limit]

    def _drop(self, name: int, worker_id: str) -> None:
        holders = self._holders[name]
        del holders[worker_id]
        if not holders:
            del self._holders[name]


def _depth(hashes: Sequence[int], known: Container[int]) -> int:
    """How many hashes are known, if all are that follow one that is."""
    return len(hashes) - bisect_left(hashes, True, key=known.__contains__)  # so C does the halving


def pack_names(names: Sequence[bytes]) -> bytes:
    return b"".join(name[:NAME_BYTES] for name in names)


def unpack_names(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // NAME_BYTES}Q", packed)


def hashes_of_prompt(salt: bytes, block_size: int, token_ids: Sequence[int]) -> PrefixHashes:
    """What the gateway sends along: at most ``MAX_HASHES`` names, evenly spread over the prompt's first blocks."""
    num_blocks = min(len(token_ids) // block_size, MAX_HASHED_BLOCKS)
    every = max(1, -(-num_blocks // MAX_HASHES))
    names = HashChain(salt, block_size).hashes(token_ids[: num_blocks * block_size])[every - 1 :: every]
    return PrefixHashes(block_size, every * block_size, unpack_names(pack_names(names[::-1])))
