"""Slots that transfers share: each is one transfer's at a time, and those who wait get them in turn."""

from __future__ import annotations

import os

import pytest

from kvcache.transfer.port_choice import HAS_SHM
from kvcache.transfer.slot_pool import NUM_SLOTS, SlotPool

pytestmark = pytest.mark.skipif(not HAS_SHM, reason="Linux only")

SLOT_BYTES = 4096


def test_whoever_asks_first_gets_a_slot_first_and_no_slot_is_given_twice() -> None:
    pool = SlotPool(SLOT_BYTES)
    pool.join()
    granted: list[tuple[str, int]] = []
    for index in range(NUM_SLOTS + 2):
        pool.turns.ask(lambda slot, name=f"transfer-{index}": granted.append((name, slot)))  # type: ignore[misc]
    assert sorted(slot for _, slot in granted) == list(range(NUM_SLOTS))
    pool.turns.give_back(2)
    pool.turns.give_back(0)
    assert granted[NUM_SLOTS:] == [(f"transfer-{NUM_SLOTS}", 2), (f"transfer-{NUM_SLOTS + 1}", 0)]
    assert pool.leave()


def test_what_was_asked_and_taken_back_is_not_granted() -> None:
    pool = SlotPool(SLOT_BYTES)
    pool.join()
    granted: list[int] = []
    for _ in range(NUM_SLOTS):
        pool.turns.ask(granted.append)
    late: list[int] = []
    pool.turns.ask(late.append)
    pool.turns.forget(late.append)
    pool.turns.give_back(granted[0])
    assert late == []
    pool.turns.ask(late.append)
    assert late == [granted[0]]
    assert pool.leave()


def test_a_lone_transfer_uses_no_more_memory_than_it_fills() -> None:
    """The slot that was free last is taken first."""
    pool = SlotPool(SLOT_BYTES)
    pool.join()
    used: list[int] = []
    for _ in range(10):
        pool.turns.ask(used.append)
        pool.turns.ask(used.append)
        pool.turns.give_back(used[-2])
        pool.turns.give_back(used[-1])
    assert len(set(used)) == 2
    assert pool.leave()


def test_the_memory_goes_with_the_last_transfer() -> None:
    pool = SlotPool(SLOT_BYTES)
    pool.join()
    pool.join()
    shared = pool.has_others, pool.leave(), pool.has_others
    assert shared == (True, False, False)
    pool.slots[0][:4] = b"here"
    assert pool.leave()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pool.descriptor)
    with pytest.raises(ValueError, match="released"):
        bytes(pool.slots[0])
