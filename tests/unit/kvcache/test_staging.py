"""Blocks to bytes and back as on a GPU, with a stream that does everything at once: against the plain way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from kvcache.staging import StagedCopies
from kvcache.storage import PagedStorage
from tests.builders import fill_with_noise, make_spec

NUM_BLOCKS = 6


class FakeStream:
    """Notes what happens on it, so that a copy that nobody waited for shows."""

    def __init__(self) -> None:
        self.is_active = False
        self.num_waits = 0
        self.buffer_bytes: list[int] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self.is_active = True
        yield
        self.is_active = False

    def synchronize(self) -> None:
        assert self.is_active
        self.num_waits += 1

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        self.buffer_bytes.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)


def make_storage(dtype: str, seed: int) -> PagedStorage:
    storage = PagedStorage(make_spec(dtype=dtype), NUM_BLOCKS)
    fill_with_noise(storage, seed)
    return storage


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "fp8"])
def test_staged_blocks_are_the_blocks(dtype: str) -> None:
    source, target, expected = make_storage(dtype, 1), make_storage(dtype, 2), make_storage(dtype, 2)
    copies = StagedCopies(FakeStream())
    payload = copies.read(source.layers[1], [4, 0, 3])
    assert bytes(payload) == bytes(source.read_blocks(1, [4, 0, 3]))
    copies.write(target.layers[1], [2, 5, 1], payload)
    expected.write_blocks(1, [2, 5, 1], payload)
    assert torch.equal(target.layers[1], expected.layers[1])


def test_every_copy_is_waited_for_on_its_own_stream() -> None:
    storage, stream = make_storage("float32", 1), FakeStream()
    copies = StagedCopies(stream)
    payload = copies.read(storage.layers[0], [1])
    assert stream.num_waits == 1
    copies.write(storage.layers[0], [2], payload)
    assert stream.num_waits == 2


def test_the_next_copy_does_not_change_the_bytes_of_the_last() -> None:
    storage = make_storage("float32", 1)
    copies = StagedCopies(FakeStream())
    first = copies.read(storage.layers[0], [1, 2])
    before = bytes(first)
    copies.read(storage.layers[0], [3, 4])
    assert bytes(first) == before


def test_one_buffer_serves_all_copies_up_to_the_largest() -> None:
    storage, stream = make_storage("float32", 1), FakeStream()
    copies, size = StagedCopies(stream), storage.spec.layer_block_bytes
    for block_ids in ([1], [1, 2, 3], [4], [5, 2]):
        copies.write(storage.layers[0], block_ids, copies.read(storage.layers[0], block_ids))
    assert stream.buffer_bytes == [0, size, 3 * size]
