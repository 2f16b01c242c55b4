"""Bytes in and out of the paged tensors."""

from __future__ import annotations

import struct

import pytest
import torch

from kvcache.errors import InvariantError
from kvcache.spec import CACHE_DTYPES
from kvcache.storage import PagedStorage
from tests.builders import fill_with_noise, make_spec

DTYPES = list(CACHE_DTYPES)
NUM_BLOCKS = 5


def make_storage(dtype: str, seed: int) -> PagedStorage:
    storage = PagedStorage(make_spec(dtype=dtype), NUM_BLOCKS)
    fill_with_noise(storage, seed)
    return storage


def raw_bytes(block: torch.Tensor) -> bytes:
    """Number by number, so that no stride and no view can hide anything."""
    integers = block.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[block.element_size()]).flatten().tolist()
    return b"".join(struct.pack({4: "<i", 2: "<h", 1: "<b"}[block.element_size()], number) for number in integers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_read_in_the_given_order(dtype: str) -> None:
    storage = make_storage(dtype, seed=1)
    expected = raw_bytes(storage.layers[1][3]) + raw_bytes(storage.layers[1][0])
    assert bytes(storage.read_blocks(1, [3, 0])) == expected
    assert len(expected) == 2 * storage.spec.layer_block_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_read_can_be_written_elsewhere(dtype: str) -> None:
    source, target = make_storage(dtype, seed=1), make_storage(dtype, seed=2)
    before = [layer.clone() for layer in target.layers]
    target.write_blocks(1, [4, 2], source.read_blocks(1, [0, 3]))
    assert torch.equal(target.layers[1][4], source.layers[1][0])
    assert torch.equal(target.layers[1][2], source.layers[1][3])
    assert torch.equal(target.layers[0], before[0])
    assert torch.equal(target.layers[1][[0, 1, 3]], before[1][[0, 1, 3]])


def test_a_block_holds_keys_before_values_head_by_head() -> None:
    """Offset of number (k or v, head, place, dimension), worked out from the picture in ``KVCacheSpec``."""
    storage = make_storage("float32", seed=1)
    spec = storage.spec
    numbers = struct.unpack(f"<{spec.layer_block_bytes // 4}f", storage.read_blocks(0, [2]))
    for which in range(2):
        for head in range(spec.num_kv_heads):
            for place in range(spec.block_size):
                for dimension in range(spec.head_size):
                    row = (which * spec.num_kv_heads + head) * spec.block_size + place
                    expected = storage.layers[0][2, which, head, place, dimension].item()
                    assert numbers[row * spec.head_size + dimension] == expected


def test_a_read_is_a_copy() -> None:
    storage = make_storage("float32", seed=1)
    read = storage.read_blocks(0, [1])
    before = bytes(read)
    storage.layers[0].zero_()
    assert bytes(read) == before


def test_a_write_keeps_no_hold_of_its_payload() -> None:
    storage = make_storage("float32", seed=1)
    payload = bytearray(storage.read_blocks(0, [1]))
    storage.write_blocks(0, [2], memoryview(payload))
    payload[:] = bytes(len(payload))
    assert torch.equal(storage.layers[0][2], storage.layers[0][1])


@pytest.mark.parametrize("difference", [-1, 1, -4])
def test_a_payload_of_a_wrong_length_is_refused_and_changes_nothing(difference: int) -> None:
    storage = make_storage("float32", seed=1)
    before = storage.layers[0].clone()
    with pytest.raises(InvariantError, match="do not fill 2 blocks"):
        storage.write_blocks(0, [0, 1], bytes(2 * storage.spec.layer_block_bytes + difference))
    assert torch.equal(storage.layers[0], before)


def test_a_new_cache_is_zero() -> None:
    storage = PagedStorage(make_spec(), NUM_BLOCKS)
    assert all(not layer.any() for layer in storage.layers)
