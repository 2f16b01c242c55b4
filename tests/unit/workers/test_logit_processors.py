"""Masks, biases and penalties, against a row in plain Python; and what a sequence's state remembers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scheduler.request import SamplingParams, TokenHistory
from tests.builders import repeatable
from tests.unit.workers.reference_sampling import processed
from workers.model.logit_processors import process
from workers.model.sequence_state import SequenceState

VOCAB_SIZE = 12
TOKENS = st.integers(0, VOCAB_SIZE - 1)
LISTS = st.lists(TOKENS, max_size=10)
PENALTIES = st.floats(-2, 2, width=16)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(9),
    stop_token_ids=st.lists(TOKENS, max_size=2).map(tuple),
    presence_penalty=PENALTIES,
    frequency_penalty=PENALTIES,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.25, 3.0]),
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100, width=16), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
    bad_words=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    allowed_token_ids=st.lists(TOKENS, max_size=6, unique=True).map(tuple),
    min_tokens=st.integers(0, 9),
)
ROWS = st.lists(st.tuples(PARAMS, LISTS, LISTS), min_size=1, max_size=4)


def logits_of(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(num_rows)) * 3


def state_of(sampling: SamplingParams, prompt: list[int], output: list[int]) -> SequenceState:
    history = TokenHistory(prompt + output, len(prompt) + len(output), len(prompt))
    state = SequenceState(sampling, history)
    state.advance(history)
    return state


@repeatable(max_examples=150)
@given(ROWS)
def test_every_row_is_changed_as_its_own_parameters_say(
    rows: list[tuple[SamplingParams, list[int], list[int]]],
) -> None:
    logits = logits_of(len(rows))
    expected = [processed(row, *one) for row, one in zip(logits.tolist(), rows, strict=True)]
    process(logits, [state_of(*one) for one in rows])
    assert logits.tolist() == expected


@repeatable(max_examples=50)
@given(PARAMS, LISTS, LISTS)
def test_a_state_that_grew_with_its_sequence_is_one_made_at_once(
    sampling: SamplingParams, prompt: list[int], output: list[int]
) -> None:
    sampling = replace(sampling, repetition_penalty=2.0)
    token_ids = list(prompt)
    grown = SequenceState(sampling, TokenHistory(token_ids, len(prompt), len(prompt)))
    for token in [None, *output]:
        if token is not None:
            token_ids.append(token)
        for _ in range(2):  # a step that failed is run again
            grown.advance(TokenHistory(token_ids, len(token_ids), len(prompt)))
    results = [logits_of(1), logits_of(1)]
    process(results[0], [grown])
    process(results[1], [state_of(sampling, prompt, output)])
    assert torch.equal(*results)


def test_a_history_speaks_of_its_own_moment_though_the_list_grows() -> None:
    token_ids = [1, 2, 3]
    history = TokenHistory(token_ids, 3, 2)
    token_ids += [4, 5]
    state = SequenceState(SamplingParams(9, frequency_penalty=1.0), history)
    state.advance(history)
    assert dict(zip(state.counts.token_ids.tolist(), state.counts.output_counts.tolist(), strict=True)) == {
        1: 0.0,
        2: 0.0,
        3: 1.0,
    }


def test_counts_have_room_for_a_long_sequence() -> None:
    token_ids = [token % 1000 for token in range(2500)]
    state = SequenceState(SamplingParams(9, frequency_penalty=1.0), TokenHistory(token_ids, 2500, 500))
    state.advance(TokenHistory(token_ids, 2500, 500))
    assert state.counts.token_ids.tolist() == list(range(1000))
    assert state.counts.output_counts.tolist() == [2.0] * 1000


@pytest.mark.parametrize(("output", "forbidden"), [([], []), ([5], []), ([5, 6], [7]), ([6], []), ([5, 6, 6], [])])
def test_a_bad_word_of_several_tokens_is_forbidden_at_its_last(output: list[int], forbidden: list[int]) -> None:
    """The prompt ends as the word begins: only what was generated counts."""
    assert state_of(SamplingParams(9, bad_words=((5, 6, 7),)), [5, 6], output).forbidden() == forbidden
