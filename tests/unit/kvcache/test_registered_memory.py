"""Buffers that an RDMA library knows: registered once, used again, and never those that somebody may still write to."""

from __future__ import annotations

import pytest

from kvcache.errors import ResourceError
from kvcache.transfer import registered_memory
from kvcache.transfer.registered_memory import MIN_BUFFER_BYTES, RegisteredMemory
from tests.fake_rdma import FakeMemory

SIZE = MIN_BUFFER_BYTES


def make_memory() -> tuple[FakeMemory, RegisteredMemory]:
    remote = FakeMemory()
    return remote, RegisteredMemory(remote)


def test_a_buffer_has_room_and_is_registered_as_a_whole() -> None:
    remote, memory = make_memory()
    for num_bytes in (1, SIZE, SIZE + 1, 3 << 20):
        buffer = memory.take(num_bytes)
        assert len(buffer.view) >= num_bytes
        assert remote.registered[buffer.address] == len(buffer.view)
        buffer.view[-1] = 1


def test_a_buffer_that_was_given_back_is_used_again_and_not_registered_again() -> None:
    remote, memory = make_memory()
    first, second = memory.take(SIZE), memory.take(SIZE)
    assert first is not second
    memory.give_back(first)
    assert memory.take(SIZE - 1) is first
    assert len(remote.registered) == 2


def test_free_buffers_beyond_the_limit_are_unregistered_and_their_pages_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registered_memory, "KEPT_BYTES", 2 * SIZE)
    remote, memory = make_memory()
    buffers = [memory.take(SIZE) for _ in range(4)]
    for buffer in buffers:
        buffer.view[0] = 7
        memory.give_back(buffer)
    assert memory.free_bytes == 2 * SIZE
    assert set(remote.registered) == {buffer.address for buffer in buffers[:2]}
    assert [buffer.view[0] for buffer in buffers] == [7, 7, 0, 0]
    assert {memory.take(SIZE).address for _ in range(4)} == {buffer.address for buffer in buffers}
    assert len(remote.registered) == 4


def test_a_buffer_that_was_given_up_is_never_used_again_and_its_address_stays_taken() -> None:
    remote, memory = make_memory()
    lost = memory.take(SIZE)
    memory.give_up(lost)
    assert memory.num_lost == 1
    assert lost.address not in remote.registered
    assert all(memory.take(SIZE).address != lost.address for _ in range(50))
    lost.view[0] = 1  # whoever writes late finds memory there


def test_a_registration_that_fails_costs_nothing() -> None:
    remote, memory = make_memory()
    remote.room_bytes = SIZE - 1
    with pytest.raises(ResourceError):
        memory.take(SIZE)
    remote.room_bytes = SIZE
    memory.give_back(memory.take(SIZE))
    assert memory.free_bytes == SIZE
