"""A plan as tensors, against rows written by hand. Blocks hold four tokens."""

from __future__ import annotations

import torch

from scheduler.step_plan import ScheduledChunk, StepPlan
from tests.builders import BLOCK_SIZE, make_sampling, make_scheduled
from workers.model.step_inputs import StepInputs, build_step_inputs

SAMPLED = make_sampling()
SHORT = make_scheduled("short", [11], 2, [9], SAMPLED)  # its third token
LONG = make_scheduled("long", [12], 8, [3, 7, 5, 8], SAMPLED)  # its ninth; block 8 is for later tokens
FRESH = make_scheduled("fresh", [21, 22, 23, 24, 25], 0, [2, 6])  # a prompt's first chunk
LAST = make_scheduled("last", [31, 32, 33], 6, [4, 1, 10], SAMPLED)  # a prompt's last


def build(*chunks: ScheduledChunk) -> StepInputs:
    return build_step_inputs(StepPlan(chunks), BLOCK_SIZE)


def decoding(num_tokens: int) -> ScheduledChunk:
    """A sequence whose last of ``num_tokens`` tokens is computed now, in blocks 1, 2, 3 and so on."""
    return make_scheduled("d", [7], num_tokens - 1, range(1, 30), SAMPLED)


def test_single_tokens_come_first_by_length_then_prompt_chunks_in_plan_order() -> None:
    assert build(FRESH, LONG, LAST, SHORT).token_ids.tolist() == [[11, 12, 21, 22, 23, 24, 25, 31, 32, 33]]


def test_positions_continue_where_each_sequence_is() -> None:
    assert build(SHORT, LONG, FRESH, LAST).positions.tolist() == [[2, 8, 0, 1, 2, 3, 4, 6, 7, 8]]


def test_each_token_is_written_to_its_place_in_its_own_block() -> None:
    attention = build(SHORT, LONG, FRESH, LAST).attention[None]
    assert attention.write_blocks.tolist() == [9, 5, 2, 2, 2, 2, 6, 1, 1, 10]
    assert attention.write_offsets.tolist() == [2, 0, 0, 1, 2, 3, 0, 2, 3, 0]


def test_logits_are_needed_at_the_last_row_of_chunks_that_sample() -> None:
    assert build(FRESH, SHORT, LAST, LONG).logit_rows.tolist() == [0, 9, 1]  # in the order of the plan


def test_a_step_that_samples_nothing_needs_no_logits() -> None:
    inputs = build(FRESH)
    assert inputs.logit_rows.tolist() == []
    assert inputs.logit_rows.dtype == torch.int64


def test_decode_tables_list_the_used_blocks_and_are_padded_within_their_group() -> None:
    three, four = decoding(9), decoding(13)
    (group,) = build(four, three).attention[None].decode_groups
    assert group.block_ids.tolist() == [[1, 2, 3, 1], [1, 2, 3, 4]]


def test_the_decode_mask_is_true_for_the_tokens_up_to_the_new_one() -> None:
    (group,) = build(decoding(10), decoding(13)).attention[None].decode_groups
    assert (group.mask.shape, group.mask.dtype) == ((2, 1, 1, 16), torch.bool)
    assert group.mask[:, 0, 0].tolist() == [[True] * 10 + [False] * 6, [True] * 13 + [False] * 3]


def test_decode_groups_cover_every_decoding_row_once_and_at_most_double_the_blocks() -> None:
    chunks = [decoding(num_tokens) for num_tokens in (70, 1, 33, 5, 4, 17, 16, 65, 9, 64, 2)]
    inputs = build(FRESH, *chunks)
    rows: list[int] = []
    for group in inputs.attention[None].decode_groups:
        rows += range(group.first_row, group.first_row + len(group.block_ids))
        for length in group.mask.sum(dim=-1).flatten().tolist():
            assert group.block_ids.shape[1] < 2 * -(-length // BLOCK_SIZE) or group.block_ids.shape[1] == 1
    assert rows == list(range(len(chunks)))
    lengths = torch.cat([group.mask.sum(dim=-1).flatten() for group in inputs.attention[None].decode_groups])
    assert lengths.tolist() == (inputs.positions[0, : len(chunks)] + 1).tolist()


def test_a_prompt_span_says_which_rows_and_which_blocks_with_how_many_tokens() -> None:
    fresh, last = build(SHORT, FRESH, LAST).attention[None].prompt_spans
    assert (fresh.first_row, fresh.num_rows, fresh.num_keys, fresh.block_ids.tolist()) == (1, 5, 5, [2, 6])
    assert (last.first_row, last.num_rows, last.num_keys, last.block_ids.tolist()) == (6, 3, 9, [4, 1, 10])


def test_a_prompt_of_one_token_is_treated_as_decode() -> None:
    attention = build(make_scheduled("one", [5], 0, [3], SAMPLED)).attention[None]
    (group,) = attention.decode_groups
    assert (attention.prompt_spans, group.block_ids.tolist()) == ((), [[3]])
    assert group.mask[0, 0, 0].tolist() == [True, False, False, False]


def test_a_step_of_prompts_has_no_decode_part() -> None:
    assert build(FRESH, LAST).attention[None].decode_groups == ()


def test_a_token_that_fills_its_block_needs_no_further_one() -> None:
    (group,) = build(make_scheduled("full", [5], 7, [3, 4, 6], SAMPLED)).attention[None].decode_groups
    assert group.block_ids.tolist() == [[3, 4]]


def test_sequences_longer_than_a_window_make_one_group_of_the_blocks_in_it() -> None:
    attention = build_step_inputs(
        StepPlan((decoding(70), decoding(41), decoding(3))), BLOCK_SIZE, windows=(6,)
    ).attention
    short, long = attention[6].decode_groups
    assert short.block_ids.tolist() == [[1]]
    assert short.mask[:, 0, 0].tolist() == [[True] * 3 + [False]]
    assert long.block_ids.tolist() == [[9, 10, 11], [17, 18, 17]]  # tokens 35 to 40, tokens 64 to 69
    assert long.mask[:, 0, 0].int().tolist() == [[0] * 3 + [1] * 6 + [0] * 3, [1] * 6 + [0] * 6]


def test_a_prompt_span_reads_from_the_first_block_in_its_window() -> None:
    (span,) = build_step_inputs(StepPlan((LAST,)), BLOCK_SIZE, windows=(2,)).attention[2].prompt_spans
    assert (span.num_keys, span.block_ids.tolist()) == (5, [1, 10])  # tokens 4 to 8, of which 5 is the first seen
    assert span.mask is not None
    assert span.mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_a_prompt_that_fits_its_window_needs_no_mask() -> None:
    attention = build_step_inputs(StepPlan((FRESH,)), BLOCK_SIZE, windows=(None, 5, 4)).attention
    assert [attention[window].prompt_spans[0].mask is None for window in (None, 5, 4)] == [True, True, False]


def test_indices_are_64_bit_integers() -> None:
    inputs = build(SHORT, FRESH)
    attention = inputs.attention[None]
    tensors = [inputs.token_ids, inputs.positions, inputs.logit_rows]
    tensors += [attention.write_blocks, attention.write_offsets]
    tensors += [group.block_ids for group in attention.decode_groups]
    tensors += [span.block_ids for span in attention.prompt_spans]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
