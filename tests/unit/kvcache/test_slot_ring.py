"""Memory that two processes share: what one writes the other reads, and nothing but that is accepted."""

from __future__ import annotations

import fcntl
import os
import tempfile

import pytest

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer.port_choice import HAS_SHM
from kvcache.transfer.slot_ring import MAX_SLOTS, MappedRings, SlotRing
from kvcache.transfer.wire import MAX_BLOCK_BYTES

pytestmark = pytest.mark.skipif(not HAS_SHM, reason="Linux only")

SLOT_BYTES = 5000  # no multiple of a page


def unsealed(num_bytes: int, seals: int = 0) -> int:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def check_refused(descriptor: int, fault: TransferFault, slot_bytes: int = SLOT_BYTES, num_slots: int = 4) -> None:
    try:
        with pytest.raises(TransferError) as caught:
            SlotRing.open(descriptor, slot_bytes, num_slots)
        assert caught.value.fault is fault
    finally:
        os.close(descriptor)


def test_what_is_put_into_a_slot_is_read_from_the_same_slot_of_the_other_side() -> None:
    ours, descriptor = SlotRing.create(SLOT_BYTES, 3)
    theirs = SlotRing.open(descriptor, SLOT_BYTES, 3)
    os.close(descriptor)
    for index, slot in enumerate(ours.slots):
        slot[:] = bytes((index + 1,)) * SLOT_BYTES
    assert [bytes(slot) for slot in theirs.slots] == [bytes((index + 1,)) * SLOT_BYTES for index in range(3)]


def test_the_receiver_cannot_write() -> None:
    _, descriptor = SlotRing.create(SLOT_BYTES, 4)
    theirs = SlotRing.open(descriptor, SLOT_BYTES, 4)
    os.close(descriptor)
    assert theirs.slots[0].readonly


def test_the_sender_cannot_change_the_size_any_more() -> None:
    _, descriptor = SlotRing.create(SLOT_BYTES, 4)
    for size in (0, 1 << 20):
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(descriptor, size)
    os.close(descriptor)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
def test_memory_that_could_change_its_size_is_refused(seals: int) -> None:
    check_refused(unsealed(4 * SLOT_BYTES, seals), TransferFault.INCOMPATIBLE)


def test_a_file_is_refused() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(4 * SLOT_BYTES)
        check_refused(os.dup(file.fileno()), TransferFault.INCOMPATIBLE)


def test_a_pipe_is_refused() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    check_refused(reading, TransferFault.INCOMPATIBLE)


@pytest.mark.parametrize(("slot_bytes", "num_slots"), [(SLOT_BYTES + 1, 4), (SLOT_BYTES, 3), (SLOT_BYTES, 5)])
def test_another_size_than_was_said_is_refused(slot_bytes: int, num_slots: int) -> None:
    _, descriptor = SlotRing.create(SLOT_BYTES, 4)
    check_refused(descriptor, TransferFault.INCOMPATIBLE, slot_bytes, num_slots)


@pytest.mark.parametrize(
    ("slot_bytes", "num_slots"), [(0, 4), (SLOT_BYTES, 0), (MAX_BLOCK_BYTES + 1, 1), (1, MAX_SLOTS + 1)]
)
def test_a_ring_of_impossible_size_is_refused(slot_bytes: int, num_slots: int) -> None:
    _, descriptor = SlotRing.create(SLOT_BYTES, 4)
    check_refused(descriptor, TransferFault.OUT_OF_BOUNDS, slot_bytes, num_slots)


def test_a_ring_that_comes_again_is_mapped_once_and_until_the_last_has_left() -> None:
    ours, descriptor = SlotRing.create(SLOT_BYTES, 2)
    again = os.dup(descriptor)
    rings = MappedRings()
    with rings.open(descriptor, SLOT_BYTES, 2) as first:
        os.close(descriptor)
        with rings.open(again, SLOT_BYTES, 2) as second:
            assert second is first
        ours.slots[1][:4] = b"here"
        assert first.slots[1][:4] == b"here"
    with pytest.raises(ValueError, match="released"):
        bytes(first.slots[0])
    with rings.open(again, SLOT_BYTES, 2) as anew:
        assert anew is not first
    os.close(again)


def test_other_memory_and_another_cut_of_the_same_are_mapped_anew() -> None:
    rings = MappedRings()
    descriptors = [SlotRing.create(SLOT_BYTES, 2)[1] for _ in range(2)]
    with rings.open(descriptors[0], SLOT_BYTES, 2) as first:
        with rings.open(descriptors[1], SLOT_BYTES, 2) as second:
            assert second is not first
        with rings.open(descriptors[0], 2 * SLOT_BYTES, 1) as cut:
            assert len(cut.slots) == 1
        for shape in ((SLOT_BYTES, 3), (SLOT_BYTES, MAX_SLOTS + 1)):
            with pytest.raises(TransferError), rings.open(descriptors[0], *shape):
                pass
    for descriptor in descriptors:
        os.close(descriptor)
