"""When a handoff's KV is rounded for the way, and what comes of it."""

from __future__ import annotations

import pytest
import torch

from kvcache.errors import InvariantError
from kvcache.rows import decode_rows
from kvcache.spec import KVCacheSpec
from kvcache.storage import ROW_DTYPES, BlockStorage, PagedStorage
from kvcache.transfer.compress import RoundedReads
from tests.builders import fill_with_noise, make_spec
from workers.rates import Rate
from workers.transfer_dtype import MIN_MEASURED_BYTES, WireFormat
from workers.worker_options import TransferDtype

ADDRESS = "decode:1"
NUM_BLOCKS, NUM_TOKENS = 100, 400
SPEC = make_spec(head_size=16)


def storage_of(spec: KVCacheSpec = SPEC) -> PagedStorage:
    storage = PagedStorage(spec, 4)
    fill_with_noise(storage, seed=1)
    return storage


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("sent", "error"), [("int8", 0.5 / 127), ("fp8", 1 / 16)])
def test_rounded_blocks_read_as_what_is_kept_to_what_rounding_costs(kept: str, sent: str, error: float) -> None:
    spec = make_spec(head_size=16, dtype=kept)
    storage = storage_of(spec)
    reads = RoundedReads(storage, sent)
    payload = reads.read_blocks(1, [3, 0])
    assert len(payload) == 2 * reads.spec.layer_block_bytes < 2 * spec.layer_block_bytes
    rows = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(-1, reads.spec.row_bytes)
    found = decode_rows(rows.view(ROW_DTYPES[sent]), torch.float32).flatten()
    expected = torch.cat([storage.layers[1][block].flatten() for block in (3, 0)]).float()
    largest = expected.view(-1, spec.head_size).abs().amax(dim=1).repeat_interleave(spec.head_size)
    assert ((found - expected).abs() <= error * largest + 1e-6).all()
    slot = memoryview(bytearray(len(payload)))
    assert reads.read_blocks(1, [3, 0], slot) == payload == slot


def test_what_is_rounded_already_is_not_rounded_again() -> None:
    storage = storage_of(make_spec(dtype="fp8"))
    with pytest.raises(InvariantError):
        RoundedReads(storage, "int8")
    assert WireFormat(storage, "int8", Rate()).storage_for(ADDRESS, NUM_BLOCKS, NUM_TOKENS) is storage


def chosen(
    dtype: TransferDtype,
    link_bytes_s: float | None,
    prefill_tokens_s: float | None,
    rounding_bytes_s: float | None = None,
) -> str:
    storage: BlockStorage = storage_of()
    prefill_rate = Rate()
    if prefill_tokens_s is not None:
        prefill_rate.add(prefill_tokens_s, 1.0)
    wire = WireFormat(storage, dtype, prefill_rate)
    if link_bytes_s is not None:
        wire.note_link(ADDRESS, MIN_MEASURED_BYTES, MIN_MEASURED_BYTES / link_bytes_s)
    if rounding_bytes_s is not None:
        wire._rounding_rate.add(rounding_bytes_s, 1.0)
    spec = wire.storage_for(ADDRESS, NUM_BLOCKS, NUM_TOKENS).spec
    assert wire.num_compressed == (spec != SPEC)
    return "native" if spec == SPEC else spec.dtype


@pytest.mark.parametrize("dtype", ["native", "int8", "fp8"])
def test_a_dtype_that_is_asked_for_is_taken_whatever_was_measured(dtype: TransferDtype) -> None:
    assert chosen(dtype, None, None) == dtype
    assert chosen(dtype, 1e12, 1.0) == dtype


def test_what_was_not_measured_is_no_reason_to_round() -> None:
    assert chosen("auto", None, 100.0) == "native"
    assert chosen("auto", 1.0, None) == "native"


def test_auto_rounds_when_the_link_takes_longer_than_computing_hides() -> None:
    num_bytes = NUM_BLOCKS * SPEC.block_bytes  # NUM_TOKENS take four seconds at 100 per second
    assert chosen("auto", num_bytes / 3.9, 100.0) == "native"
    assert chosen("auto", num_bytes / 4.1, 100.0) == "int8"


def test_auto_does_not_round_when_rounding_takes_longer_than_it_saves() -> None:
    num_bytes = NUM_BLOCKS * SPEC.block_bytes
    assert chosen("auto", num_bytes / 8, 100.0, rounding_bytes_s=num_bytes / 1) == "int8"
    assert chosen("auto", num_bytes / 8, 100.0, rounding_bytes_s=num_bytes / 7) == "native"


def test_a_few_bytes_say_nothing_of_a_link() -> None:
    rate = Rate()
    rate.add(100.0, 1.0)
    wire = WireFormat(storage_of(), "auto", rate)
    wire.note_link(ADDRESS, MIN_MEASURED_BYTES - 1, 1000.0)
    assert wire.storage_for(ADDRESS, NUM_BLOCKS, NUM_TOKENS).spec == SPEC
