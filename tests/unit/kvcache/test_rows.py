"""Rounded keys and values, number by number against what the formats are."""

from __future__ import annotations

import math

import pytest
import torch

from kvcache.rows import decode_rows, encode_rows
from kvcache.spec import CACHE_DTYPES
from kvcache.storage import PagedStorage
from tests.builders import make_spec

SCALED = {"int8": torch.int8, "fp8": torch.uint8}


def fp8_numbers() -> list[float]:
    """Every positive number of e4m3: exponents 2^-6 ... 2^8 with 3 bits of mantissa, and the subnormal ones."""
    normal = [(1 + mantissa / 8) * 2.0**exponent for exponent in range(-6, 9) for mantissa in range(8)]
    return [mantissa / 8 * 2.0**-6 for mantissa in range(8)] + normal[:-1]  # the last one's bits are NaN


def nearest(number: float, grid: list[float]) -> float:
    """Its distance to the nearest number of the grid, either sign."""
    return min(abs(abs(number) - candidate) for candidate in grid)


@pytest.mark.parametrize("dtype", SCALED)
def test_a_number_is_off_by_no_more_than_the_nearest_of_its_format(dtype: str) -> None:
    grid, largest = (list(map(float, range(128))), 127.0) if dtype == "int8" else (fp8_numbers(), 448.0)
    numbers = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(3)) * 10
    read = decode_rows(encode_rows(numbers, SCALED[dtype]), torch.float32)
    for row, found in zip(numbers.flatten(0, 1).tolist(), read.flatten(0, 1).tolist(), strict=True):
        scale = max(map(abs, row)) / largest
        for number, other in zip(row, found, strict=True):
            assert abs(number - other) <= scale * nearest(number / scale, grid) + 1e-5


@pytest.mark.parametrize("dtype", SCALED)
def test_a_row_s_largest_number_is_kept(dtype: str) -> None:
    numbers = torch.tensor([[0.001, -5.0, 2.0, 0.0], [1e-6, 0.0, -1e-7, 0.0]])
    read = decode_rows(encode_rows(numbers, SCALED[dtype]), torch.float32)
    assert read[0, 1].item() == pytest.approx(-5.0)
    assert read[1, 0].item() == pytest.approx(1e-6)


@pytest.mark.parametrize("dtype", SCALED)
def test_zeros_stay_zeros(dtype: str) -> None:
    assert not decode_rows(encode_rows(torch.zeros(3, 8), SCALED[dtype]), torch.float32).any()


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_bad_number_is_not_finite_and_others_are(dtype: str, bad: float) -> None:
    numbers = torch.ones(2, 8)
    numbers[0, 3] = bad
    read = decode_rows(encode_rows(numbers, SCALED[dtype]), torch.float32)
    assert not read[0].isfinite().any()
    assert torch.equal(read[1], numbers[1])


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_rows_fit_the_storage_and_an_empty_block_reads_as_zeros(dtype: str) -> None:
    spec = make_spec(dtype=dtype)
    layer = PagedStorage(spec, 2).layers[0]
    read = decode_rows(layer, torch.bfloat16)
    assert (read.shape, read.dtype) == ((2, 2, spec.num_kv_heads, spec.block_size, spec.head_size), torch.bfloat16)
    assert not read.any()
    layer[1] = encode_rows(torch.ones(read.shape[1:]), layer.dtype)
    assert torch.equal(decode_rows(layer, torch.float32)[1], torch.ones(read.shape[1:]))
