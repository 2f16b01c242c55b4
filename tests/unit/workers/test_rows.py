"""Operations on rows of logits, against plain Python over one row."""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from itertools import accumulate

import pytest
import torch

from workers.model.rows import NONE, Descending, index_at, largest, likeliest, padded

SIZES = (1, 5, 255, 256, 257, 300, 512, 1000, 5003)


def noise(num_rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_is_the_first_of_the_largest(size: int, dtype: torch.dtype) -> None:
    rows = (noise(40, size) * 2).round().to(dtype)  # many values are there several times
    expected = [max(range(size), key=row.__getitem__) for row in rows.tolist()]
    assert likeliest(rows) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_no_likeliest(size: int, bad: float) -> None:
    for place in {0, size // 2, size - 1}:
        rows = noise(3, size)
        rows[1, place] = bad
        assert [token == NONE for token in likeliest(rows)] == [False, True, False]


def test_minus_infinity_is_a_value_unless_there_is_no_other() -> None:
    rows = torch.full((2, 300), -torch.inf)
    rows[0, 299] = -5.0
    assert likeliest(rows) == [299, NONE]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 20, 400])
def test_the_largest_few_are_those_of_a_sort(size: int, count: int) -> None:
    rows = noise(5, size)
    values, places = largest(padded(rows), min(count, size))
    for row, found, where in zip(rows.tolist(), values.tolist(), places.tolist(), strict=True):
        assert found == sorted(row, reverse=True)[:count]
        assert [row[place] for place in where] == found


@pytest.mark.parametrize("size", [3, 256, 700])
def test_an_index_is_drawn_as_often_as_it_weighs(size: int) -> None:
    weights = torch.rand(1, size, generator=torch.Generator().manual_seed(1))
    weights[0, ::3] = 0.0
    row = torch.zeros(1, padded(weights).shape[1])
    row[0, :size] = weights
    fractions = torch.arange(20_000, dtype=torch.float64) / 20_000
    counts = Counter(index_at(row.expand(20_000, -1), fractions).tolist())
    total = float(weights.double().sum())
    for place, weight in enumerate(weights[0].tolist()):
        assert abs(counts[place] - 20_000 * weight / total) < 2.01  # an even comb: one more or less at each end


def test_the_ends_of_the_scale_give_weights_above_zero() -> None:
    row = torch.zeros(2, 1024)
    row[:, 300], row[:, 700] = 1e-30, 1.0
    assert index_at(row, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)).tolist() == [300, 700]


@pytest.mark.parametrize("size", [1, 3, 300, 5003])
@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0, 30.0])  # ties only; one piece; a few; from 1 to nothing
def test_places_in_descending_order_are_those_of_a_sort(size: int, spread: float) -> None:
    weights = torch.softmax(spread * noise(1, size)[0], dim=-1)
    weights[size // 2 + 1 :: 5] = 0.0
    order = sorted(range(size), key=lambda index: -float(weights[index]))
    sums = list(accumulate(float(weights[index]) for index in order))
    row = Descending(weights)
    assert row.total == pytest.approx(sums[-1])
    places = []
    for fraction in (0.001, 0.1, 0.3333, 0.7, 0.99, 0.999999):
        # Between two sums, where rounding does not decide.
        at = bisect(sums, fraction * sums[-1])
        target = sums[at] - 0.5 * float(weights[order[at]])
        reached, exceeded = row.reach(target), row.exceed(target)
        assert reached == exceeded and reached.index == order[at]
        assert reached.running_sum == pytest.approx(sums[at])
        places.append(reached.place)
    assert places == sorted(places)


def test_a_sum_that_a_place_has_exactly_is_reached_there_and_exceeded_at_the_next() -> None:
    row = Descending(torch.tensor([0.25, 0.0, 0.25, 0.5]))
    assert (row.reach(0.5).index, row.exceed(0.5).index) == (3, 0)
    assert (row.reach(0.75).index, row.exceed(0.75).index) == (0, 2)
    assert row.reach(1.0).index == 2 and row.exceed(0.0).index == 3
