"""What the handoff bench concludes from what it measured."""

from __future__ import annotations

import pytest

from benchmarks.command_line import exit_status
from benchmarks.handoff import parse_options
from benchmarks.handoff_memory import buffer_bytes
from benchmarks.handoff_model import LLAMA_70B, ChunkCost, visible_ratio
from kvcache.errors import ConfigError
from kvcache.transfer.wire import MAX_CHUNK_BYTES

FREE = ChunkCost(0.0, 0.0)


def test_on_an_endless_link_nothing_is_seen() -> None:
    assert visible_ratio(4096, 0.4, 1e9, FREE) == pytest.approx(1.0, abs=1e-6)


def test_on_a_fast_link_only_the_last_layer_is_seen() -> None:
    layer_s = 8 * LLAMA_70B.handoff_bytes(4096) / 80 / 100e9
    assert visible_ratio(4096, 1.0, 100, FREE) == pytest.approx(1.0 + layer_s)


def test_on_a_slow_link_all_but_the_first_layers_computing_is_hidden_behind_the_link() -> None:
    transfer_s = 8 * LLAMA_70B.handoff_bytes(4096) / 1e9
    assert visible_ratio(4096, 0.4, 1, FREE) == pytest.approx((0.4 / 80 + transfer_s) / 0.4)


def test_the_chunks_own_cost_is_seen_where_it_is_slower_than_the_link() -> None:
    chunks = -(-LLAMA_70B.handoff_bytes(4096) // 80 // MAX_CHUNK_BYTES)
    cost = ChunkCost(per_chunk_s=1.0, message_s=5.0)
    assert visible_ratio(4096, 80.0, 400, cost) == pytest.approx((1.0 + 80 * chunks + 5.0) / 80.0)


def test_memory_that_is_held_is_counted_and_memory_that_was_freed_is_not() -> None:
    before = buffer_bytes()
    held = bytearray(50 << 20)
    assert buffer_bytes() - before >= len(held)
    del held
    assert buffer_bytes() - before < 1 << 20


@pytest.mark.parametrize("flags", [["--runs", "0"], ["--ttft-runs", "x"], ["--nonsense"]])
def test_a_wrong_flag_is_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_options(flags)
    assert exit_status(lambda: parse_options(flags).runs) == 2
