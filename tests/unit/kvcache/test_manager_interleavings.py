"""Sequences and leases in any order of events: the books are right after every step, and nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcache.errors import TransferError, TransferFault
from kvcache.lease import BlockLease, LeaseState
from tests.builders import BLOCK_SIZE, check_interleavings, make_manager

NUM_BLOCKS = 10
TTL_S = 5.0
REQUEST_IDS = st.sampled_from(["a", "b", "c", "d"])
INDEX = st.integers(0, 7)


class BlockLifecycle(RuleBasedStateMachine):
    """Keeps its own plain books beside the manager's: who holds which blocks, and until when."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = make_manager(NUM_BLOCKS, TTL_S)
        self.now = 0.0
        self.tables: dict[str, list[int]] = {}
        self.leases: list[BlockLease] = []  # ended ones too
        self.expires_at_s: list[float] = []

    @property
    def expected_free(self) -> int:
        held = {block_id for table in self.tables.values() for block_id in table}
        held |= {block_id for lease in self.leases if lease.is_open for block_id in lease.block_ids}
        return NUM_BLOCKS - len(held)

    @rule(request_id=REQUEST_IDS, num_tokens=st.integers(0, 28))
    def extend(self, request_id: str, num_tokens: int) -> None:
        before = self.tables.get(request_id, [])
        missing = (num_tokens + BLOCK_SIZE - 1) // BLOCK_SIZE - len(before)
        fits = missing <= self.expected_free
        assert self.manager.extend(request_id, num_tokens) is fits
        after = list(self.manager.block_table(request_id))
        assert after[: len(before)] == before
        assert len(after) == len(before) + (max(0, missing) if fits else 0)
        self.tables[request_id] = after

    @rule(request_id=REQUEST_IDS)
    def free(self, request_id: str) -> None:
        self.manager.free(request_id)
        self.tables.pop(request_id, None)

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
                fault = TransferFault.EXPIRED if lease.is_open else TransferFault.UNKNOWN_TRANSFER
                assert caught.value.fault is fault

    @rule(index=INDEX)
    def commit(self, index: int) -> None:
        for lease in self.leases[index : index + 1]:
            if lease.state is LeaseState.SENDING:
                self.manager.leases.commit(lease)

    @rule(index=INDEX)
    def abort(self, index: int) -> None:
        """Of any lease, ended ones too."""
        for lease in self.leases[index : index + 1]:
            self.manager.leases.abort(lease)

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
            self.manager.leases.abort(lease)

    @invariant()
    def books_are_right(self) -> None:
        self.manager.check_integrity()
        assert self.manager.num_unaccounted() == 0
        assert self.manager.num_free == self.expected_free

    def teardown(self) -> None:
        """Load stops, and the leases run out."""
        for request_id in self.tables:
            self.manager.free(request_id)
        for lease in tuple(self.manager.leases):
            self.manager.leases.abort(lease)
        self.manager.check_idle()


def test_no_interleaving_of_sequences_and_leases_leaks_a_block() -> None:
    check_interleavings(BlockLifecycle, max_examples=100)
