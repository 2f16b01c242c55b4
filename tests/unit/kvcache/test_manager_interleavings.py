"""Sequences, leases and cached prefixes in any order of events: the books are right after every step, nothing leaks,
and blocks are found, shared and evicted as in a plain list."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcache.errors import TransferError, TransferFault
from kvcache.lease import BlockLease, LeaseState
from kvcache.prefix import HashChain
from tests.builders import BLOCK_SIZE, check_interleavings, make_manager

NUM_BLOCKS = 10
TTL_S = 5.0
REQUEST_IDS = st.sampled_from(["a", "b", "c", "d"])
INDEX = st.integers(0, 7)
TEXTS = {name: HashChain(b"", BLOCK_SIZE).hashes(range(start, start + 28)) for name, start in (("x", 0), ("y", 9))}


class BlockLifecycle(RuleBasedStateMachine):
    """Keeps its own plain books beside the manager's: who holds which blocks, and until when, the free blocks in the
    order in which they will be used, and which block holds which part of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = make_manager(NUM_BLOCKS, TTL_S)
        self.now = 0.0
        self.tables: dict[str, list[int]] = {}
        self.leases: list[BlockLease] = []  # ended ones too
        self.expires_at_s: list[float] = []
        self.texts: dict[str, str] = {}  # of the sequences in tables
        self.queue = list(range(NUM_BLOCKS))  # free blocks, the next one first
        self.cached: dict[bytes, int] = {}

    @property
    def held(self) -> set[int]:
        held = {block_id for table in self.tables.values() for block_id in table}
        return held | {block_id for lease in self.leases if lease.is_open for block_id in lease.block_ids}

    def take_from_queue(self, count: int) -> list[int]:
        taken, self.queue = self.queue[:count], self.queue[count:]
        self.cached = {name: block_id for name, block_id in self.cached.items() if block_id not in taken}
        return taken

    def put_into_queue(self, block_ids: Iterable[int]) -> None:
        """Those that nobody holds any more, the last one first."""
        held = self.held
        self.queue += [block_id for block_id in reversed(list(block_ids)) if block_id not in held]

    @rule(request_id=REQUEST_IDS, num_tokens=st.integers(0, 28))
    def extend(self, request_id: str, num_tokens: int) -> None:
        before = self.tables.get(request_id, [])
        missing = max(0, (num_tokens + BLOCK_SIZE - 1) // BLOCK_SIZE - len(before))
        fits = missing <= len(self.queue)
        assert self.manager.extend(request_id, num_tokens) is fits
        self.tables[request_id] = before + (self.take_from_queue(missing) if fits else [])
        self.texts.setdefault(request_id, "x")

    @rule(request_id=REQUEST_IDS, text=st.sampled_from(sorted(TEXTS)), num_tokens=st.integers(1, 28))
    def begin(self, request_id: str, text: str, num_tokens: int) -> None:
        """As the batcher admits a sequence: with what is cached of its text, but for the last token."""
        if self.tables.get(request_id):
            self.finish(request_id)
        self.manager.free(request_id)  # an extension to nothing leaves an empty table
        prefix: list[int] = []
        for name in TEXTS[text][: (num_tokens - 1) // BLOCK_SIZE]:
            if name not in self.cached:
                break
            prefix.append(self.cached[name])
        num_new = (num_tokens + BLOCK_SIZE - 1) // BLOCK_SIZE - len(prefix)
        unheld = set(prefix) - self.held
        assert self.manager.find_prefix(TEXTS[text][: (num_tokens - 1) // BLOCK_SIZE]) == prefix
        assert self.manager.num_blocks_to_begin(num_tokens, prefix) == num_new + len(unheld)
        fits = num_new + len(unheld) <= len(self.queue)
        assert self.manager.begin(request_id, num_tokens, prefix) is fits
        if fits:
            self.queue = [block_id for block_id in self.queue if block_id not in unheld]
            self.tables[request_id] = prefix + self.take_from_queue(num_new)
            self.texts[request_id] = text

    @rule(request_id=REQUEST_IDS, first_block=st.sampled_from([0, 0, 0, 1, 3]), count=st.integers(1, 7))
    def cache(self, request_id: str, first_block: int, count: int) -> None:
        table = self.tables.get(request_id, [])[first_block : first_block + count]
        names = TEXTS[self.texts.get(request_id, "x")][first_block : first_block + len(table)]
        self.manager.cache(request_id, names, first_block)
        for name, block_id in zip(names, table, strict=True):
            self.cached.setdefault(name, block_id)

    @rule(request_id=REQUEST_IDS)
    def finish(self, request_id: str) -> None:
        """As most sequences end: all of their full blocks are cached."""
        self.cache(request_id, first_block=0, count=7)
        self.free(request_id)

    @rule(request_id=REQUEST_IDS)
    def distrust(self, request_id: str) -> None:
        self.manager.distrust(request_id)
        table = self.tables.get(request_id, [])
        self.cached = {name: block_id for name, block_id in self.cached.items() if block_id not in table}

    @rule(request_id=REQUEST_IDS)
    def free(self, request_id: str) -> None:
        self.manager.free(request_id)
        self.texts.pop(request_id, None)
        self.put_into_queue(self.tables.pop(request_id, []))

    @rule(request_id=REQUEST_IDS)
    def open_lease(self, request_id: str) -> None:
        block_ids = self.tables.get(request_id, [])
        transfer_id = f"transfer-{len(self.leases)}"
        self.leases.append(self.manager.leases.open(transfer_id, request_id, block_ids, self.now))
        self.expires_at_s.append(self.now + TTL_S)

    @rule(index=INDEX)
    def send(self, index: int) -> None:
        for lease in self.leases[index : index + 1]:
            if lease.state is LeaseState.RESERVED:
                self.manager.leases.start_sending(lease)

    @rule(index=INDEX)
    def hear_of_the_other_side(self, index: int) -> None:
        """As a chunk does: find the lease, then renew it."""
        for lease in self.leases[index : index + 1]:
            if lease.is_open and self.now < self.expires_at_s[index]:
                assert self.manager.leases.find(lease.transfer_id, lease.epoch, self.now) is lease
                self.manager.leases.renew(lease, self.now)
                self.expires_at_s[index] = self.now + TTL_S
            else:
                with pytest.raises(TransferError) as caught:
                    self.manager.leases.find(lease.transfer_id, lease.epoch, self.now)
                fault = TransferFault.EXPIRED if lease.is_open else TransferFault.STALE_EPOCH
                assert caught.value.fault is fault

    @rule(index=INDEX)
    def commit(self, index: int) -> None:
        for lease in self.leases[index : index + 1]:
            if lease.state is LeaseState.SENDING:
                self.manager.leases.commit(lease)
                self.put_into_queue(lease.block_ids)

    @rule(index=INDEX)
    def abort(self, index: int) -> None:
        """Of any lease, ended ones too."""
        for lease in self.leases[index : index + 1]:
            self.end(lease)

    @rule(index=INDEX, num_verified=st.integers(0, 7))
    def break_half_way(self, index: int, num_verified: int) -> None:
        """As a handoff that broke: what was verified of the sequence is cached, then its lease and its blocks go."""
        for lease in self.leases[index : index + 1]:
            table = self.tables.get(lease.request_id, [])
            if lease.state is LeaseState.SENDING and tuple(table) == lease.block_ids:
                self.end(lease)
                self.cache(lease.request_id, 0, num_verified)
                self.free(lease.request_id)

    def end(self, lease: BlockLease) -> None:
        was_open = lease.is_open
        self.manager.leases.abort(lease)
        if was_open:
            self.put_into_queue(lease.block_ids)

    @rule(seconds=st.sampled_from([0.5, 2.0, TTL_S]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        due = [
            lease
            for lease, expires_at_s in zip(self.leases, self.expires_at_s, strict=True)
            if lease.is_open and self.now >= expires_at_s
        ]
        for lease in due:
            self.end(lease)

    @invariant()
    def books_are_right(self) -> None:
        self.manager.check_integrity()
        assert self.manager.num_unaccounted() == 0
        assert self.manager.num_free == NUM_BLOCKS - len(self.held)
        assert {each: self.manager.block_table(each) for each in self.tables} == self.tables
        assert list(self.manager.pool._free) == self.queue
        assert sorted(self.manager.pool.prefixes) == sorted(self.cached.values())

    def teardown(self) -> None:
        """Load stops, and the leases run out."""
        for request_id in self.tables:
            self.manager.free(request_id)
        for lease in tuple(self.manager.leases):
            self.manager.leases.abort(lease)
        self.manager.check_idle()


def test_no_interleaving_of_sequences_and_leases_leaks_a_block() -> None:
    check_interleavings(BlockLifecycle, max_examples=100)
