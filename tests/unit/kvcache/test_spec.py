"""Sizes of a KV cache, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvcache.errors import ConfigError
from kvcache.spec import KVCacheSpec

SPEC = KVCacheSpec(num_layers=5, num_kv_heads=3, head_size=64, block_size=16, dtype="float32")


@pytest.mark.parametrize(
    ("dtype", "layer_block_bytes", "block_bytes", "token_bytes"),
    [
        # 2 (K and V) * 3 heads * 16 tokens * 64 = 6,144 numbers per layer and block; 384 per layer and token
        ("float32", 24_576, 122_880, 7_680),
        ("bfloat16", 12_288, 61_440, 3_840),
        ("float16", 12_288, 61_440, 3_840),
        # a byte each, and 4 for each of 2 * 3 * 16 = 96 rows
        ("int8", 6_528, 32_640, 2_040),
        ("fp8", 6_528, 32_640, 2_040),
    ],
)
def test_sizes_follow_from_the_shape(dtype: str, layer_block_bytes: int, block_bytes: int, token_bytes: int) -> None:
    spec = replace(SPEC, dtype=dtype)
    assert (spec.layer_block_bytes, spec.block_bytes, spec.token_bytes) == (layer_block_bytes, block_bytes, token_bytes)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_the_last_block_may_be_partly_filled(num_tokens: int, num_blocks: int) -> None:
    assert SPEC.num_blocks_for(num_tokens) == num_blocks


def test_a_handoff_moves_whole_blocks() -> None:
    assert SPEC.handoff_bytes(17) == 2 * 122_880


@pytest.mark.parametrize("change", [{}, {"block_size": 32}, {"dtype": "bfloat16"}, {"block_size": 8, "dtype": "int8"}])
def test_block_size_and_dtype_are_no_obstacle_to_a_handoff(change: dict[str, Any]) -> None:
    assert SPEC.obstacle(replace(SPEC, **change)) is None


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("num_layers", 6, "num_layers is 5 here and 6 there"),
        ("num_kv_heads", 4, "num_kv_heads is 3 here and 4 there"),
        ("head_size", 128, "head_size is 64 here and 128 there"),
    ],
)
def test_an_obstacle_names_the_field_and_both_values(field: str, value: object, sentence: str) -> None:
    assert SPEC.obstacle(replace(SPEC, **{field: value})) == sentence


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_size", "block_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be at least 1, not {value}"):
        replace(SPEC, **{field: value})


@pytest.mark.parametrize("dtype", ["float64", "fp16", "", "Float32"])
def test_an_unknown_dtype_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"dtype must be one of .*, not {dtype!r}"):
        replace(SPEC, dtype=dtype)
