"""Log-probabilities against sums in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from workers.model.logprobs import ROWS_AT_ONCE, token_logprobs


def noise(num_rows: int, size: int) -> torch.Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(4)) * 3


@pytest.mark.parametrize("size", [3, 256, 700])
def test_they_are_the_log_softmax_with_the_likeliest_in_order(size: int) -> None:
    logits = noise(2 * ROWS_AT_ONCE + 1, size)
    token_ids = [(7 * row) % size for row in range(len(logits))]
    counts = [row % 4 for row in range(len(logits))]
    for row, told in enumerate(token_logprobs(logits, token_ids, counts)):
        values = logits[row].tolist()
        total = math.log(math.fsum(math.exp(value) for value in values))
        order = sorted(range(size), key=lambda token: -values[token])
        assert told.logprob == pytest.approx(values[token_ids[row]] - total, abs=1e-5)
        assert told.rank == 1 + order.index(token_ids[row])
        assert list(told.top_token_ids) == order[: counts[row]]
        assert list(told.top_logprobs) == pytest.approx(
            [values[token] - total for token in order[: counts[row]]], abs=1e-5
        )


def test_a_token_has_the_same_number_by_itself_and_among_the_likeliest() -> None:
    logits = noise(9, 500)
    token_ids = logits.argmax(-1).tolist()
    assert all(told.logprob == told.top_logprobs[0] for told in token_logprobs(logits, token_ids, [1] * 9))


def test_a_row_s_numbers_do_not_depend_on_the_rows_around_it() -> None:
    logits = noise(40, 700)
    together = token_logprobs(logits, range(40), [5] * 40)
    assert together == [token_logprobs(logits[i : i + 1], [i], [5])[0] for i in range(40)]


def test_a_vocabulary_smaller_than_what_is_asked_for_is_told_in_full() -> None:
    (told,) = token_logprobs(noise(1, 3), [0], [20])
    assert sorted(told.top_token_ids) == [0, 1, 2]
