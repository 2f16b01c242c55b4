"""One step as tensors: all sequences packed into one row, and where their KV is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from scheduler.step_plan import ScheduledChunk, StepPlan


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """A chunk of one prompt inside the packed row, and the tokens of its sequence that are read for it."""

    first_row: int
    num_rows: int
    num_keys: int  # tokens from the start of the first block that is read to the end of the chunk
    block_ids: torch.Tensor  # int64 [blocks that hold them]
    mask: torch.Tensor | None  # bool [num_rows, num_keys]: True where a row may look; None for causal from token 0


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decoding sequences of similar length, one row each, padded to the longest: B sequences, N blocks."""

    first_row: int
    block_ids: torch.Tensor  # int64 [B, N], padded with the first block that is read of the sequence
    mask: torch.Tensor  # bool [B, 1, 1, N * block_size]: True where a token is that the row may see


@dataclass(frozen=True, slots=True)
class PagedAttentionInputs:
    """What the attention of all layers with one window needs in one step.

    ::

        packed row   d d d d │ d d d │ p p p p p p p │ p p p      d: one token of a decoding sequence
                     group 0 │ group 1   └ span 0 ──┘ └ span 1┘   p: tokens of a prompt chunk
    """

    write_blocks: torch.Tensor  # int64 [T]: physical block of each token of the row
    write_offsets: torch.Tensor  # int64 [T]: its place inside the block
    new_blocks: torch.Tensor  # int64: blocks that get their first token; what an earlier owner left is wiped
    decode_groups: tuple[DecodeGroup, ...]
    prompt_spans: tuple[PromptSpan, ...]


@dataclass(frozen=True, slots=True)
class StepInputs:
    token_ids: torch.Tensor  # int64 [1, T]
    positions: torch.Tensor  # int64 [1, T]
    logit_rows: torch.Tensor  # int64 [S]: rows of the packed row whose logits are needed, in the order of the plan
    attention: Mapping[int | None, PagedAttentionInputs]  # by window


def packed_chunks(plan: StepPlan) -> tuple[list[ScheduledChunk], list[ScheduledChunk]]:
    """The order of the packed row: single-token chunks, shortest sequence first; then the prompts, in plan order."""
    decode = sorted((chunk for chunk in plan.chunks if len(chunk.token_ids) == 1), key=lambda chunk: chunk.end)
    return decode, [chunk for chunk in plan.chunks if len(chunk.token_ids) > 1]


def build_step_inputs(
    plan: StepPlan, block_size: int, device: str = "cpu", windows: Collection[int | None] = (None,)
) -> StepInputs:
    """Packs a plan in the order of ``packed_chunks``.

    ``windows`` are those of the model's layers: how many tokens a query sees, itself included; None for all. With no
    window at all the result has no ``attention``.
    """
    decode, prompts = packed_chunks(plan)
    chunks = decode + prompts

    token_ids: list[int] = []
    positions: list[int] = []
    write_blocks: list[int] = []
    ends: dict[str, int] = {}
    for chunk in chunks:
        token_ids += chunk.token_ids
        positions += range(chunk.start, chunk.end)
        write_blocks += [chunk.block_table[position // block_size] for position in range(chunk.start, chunk.end)]
        ends[chunk.request_id] = len(token_ids)

    logit_rows = [
        row for chunk in plan.chunks for row in range(ends[chunk.request_id] - chunk.num_logits, ends[chunk.request_id])
    ]
    position_row = torch.tensor(positions, device=device)
    block_row = torch.tensor(write_blocks, device=device)
    offsets = position_row % block_size
    new_blocks = block_row[offsets == 0]
    attention = {
        window: PagedAttentionInputs(
            write_blocks=block_row,
            write_offsets=offsets,
            new_blocks=new_blocks,
            decode_groups=_decode_groups(decode, window, block_size, device),
            prompt_spans=_prompt_spans(prompts, len(decode), window, block_size, device),
        )
        for window in windows
    }
    return StepInputs(
        token_ids=torch.tensor([token_ids], device=device),
        positions=position_row.unsqueeze(0),
        logit_rows=torch.tensor(logit_rows, dtype=torch.long, device=device),
        attention=attention,
    )


def _first_block(position: int, window: int | None, block_size: int) -> int:
    """The first block of a sequence that holds a token in the window of a query at ``position``."""
    return max(0, position + 1 - window) // block_size if window is not None else 0


def _num_blocks(chunk: ScheduledChunk, block_size: int) -> int:
    return -(-chunk.end // block_size)


def _decode_groups(
    decode: Sequence[ScheduledChunk], window: int | None, block_size: int, device: str
) -> tuple[DecodeGroup, ...]:
    """Groups sequences whose block counts round up to the same power of two, so that padding at most doubles work.

    Of a window, sequences longer than it read the same number of blocks, or one more: they make one group.
    """
    most = (window - 2) // block_size + 2 if window is not None else None

    def size_class(chunk: ScheduledChunk) -> int:
        num_blocks = _num_blocks(chunk, block_size)
        return ((num_blocks if most is None else min(num_blocks, most)) - 1).bit_length()

    groups = []
    first_row = 0
    for _, members in groupby(decode, key=size_class):
        chunks = list(members)
        groups.append(_decode_group(first_row, chunks, window, block_size, device))
        first_row += len(chunks)
    return tuple(groups)


def _decode_group(
    first_row: int, chunks: Sequence[ScheduledChunk], window: int | None, block_size: int, device: str
) -> DecodeGroup:
    firsts = [_first_block(chunk.end - 1, window, block_size) for chunk in chunks]
    tables = [
        chunk.block_table[first : _num_blocks(chunk, block_size)] for chunk, first in zip(chunks, firsts, strict=True)
    ]
    width = max(len(table) for table in tables)
    # Padded with a block of its own: even a masked read must not see what another sequence computed.
    padded = [table + table[:1] * (width - len(table)) for table in tables]
    # Places in the gathered blocks; a sequence's last token is before this one.
    seen_to = torch.tensor(
        [chunk.end - first * block_size for chunk, first in zip(chunks, firsts, strict=True)], device=device
    ).unsqueeze(1)
    places = torch.arange(width * block_size, device=device)
    mask = places < seen_to
    if window is not None:
        mask &= places >= seen_to - window
    return DecodeGroup(first_row, torch.tensor(padded, device=device), mask.view(len(chunks), 1, 1, -1))


def _prompt_spans(
    prompts: Sequence[ScheduledChunk], first_row: int, window: int | None, block_size: int, device: str
) -> tuple[PromptSpan, ...]:
    spans = []
    for chunk in prompts:
        spans.append(_prompt_span(chunk, first_row, window, block_size, device))
        first_row += len(chunk.token_ids)
    return tuple(spans)


def _prompt_span(chunk: ScheduledChunk, first_row: int, window: int | None, block_size: int, device: str) -> PromptSpan:
    first_block = _first_block(chunk.start, window, block_size)
    table = chunk.block_table[first_block : _num_blocks(chunk, block_size)]
    mask = None
    if chunk.start or (window is not None and chunk.end > window):
        keys = torch.arange(first_block * block_size, chunk.end, device=device)
        rows = torch.arange(chunk.start, chunk.end, device=device).unsqueeze(1)
        mask = keys <= rows
        if window is not None:
            mask &= keys > rows - window
    return PromptSpan(
        first_row,
        len(chunk.token_ids),
        chunk.end - first_block * block_size,
        torch.tensor(table, dtype=torch.long, device=device),
        mask,
    )
