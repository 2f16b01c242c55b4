"""One step as tensors: all sequences packed into one row, and where their KV is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from scheduler.batching import ScheduledChunk, StepPlan


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """A chunk of one prompt inside the packed row."""

    first_row: int
    num_rows: int
    start: int  # tokens of this sequence that are in the cache already
    block_ids: torch.Tensor  # int64 [blocks that hold start + num_rows tokens]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decoding sequences of similar length, one row each, padded to the longest: B sequences, N blocks."""

    first_row: int
    block_ids: torch.Tensor  # int64 [B, N], padded with the sequence's first block
    mask: torch.Tensor  # bool [B, 1, 1, N * block_size]: True where a token is


@dataclass(frozen=True, slots=True)
class PagedAttentionInputs:
    """What the attention of every layer needs in one step.

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
    sampled_rows: torch.Tensor  # int64 [S]: rows of the packed row whose logits are needed
    sampled_chunks: tuple[ScheduledChunk, ...]  # S chunks, in the same order
    attention: PagedAttentionInputs


def build_step_inputs(plan: StepPlan, block_size: int, device: str = "cpu") -> StepInputs:
    """Packs a plan. Single-token chunks come first in the row, shortest first; then the prompts, in plan order."""
    decode = sorted((chunk for chunk in plan.chunks if len(chunk.token_ids) == 1), key=lambda chunk: chunk.end)
    prompts = [chunk for chunk in plan.chunks if len(chunk.token_ids) > 1]
    chunks = decode + prompts

    token_ids: list[int] = []
    positions: list[int] = []
    write_blocks: list[int] = []
    sampled_rows: list[int] = []
    for chunk in chunks:
        token_ids += chunk.token_ids
        positions += range(chunk.start, chunk.end)
        write_blocks += [chunk.block_table[position // block_size] for position in range(chunk.start, chunk.end)]
        if chunk.sampling is not None:
            sampled_rows.append(len(token_ids) - 1)

    position_row = torch.tensor(positions, device=device)
    block_row = torch.tensor(write_blocks, device=device)
    offsets = position_row % block_size
    attention = PagedAttentionInputs(
        write_blocks=block_row,
        write_offsets=offsets,
        new_blocks=block_row[offsets == 0],
        decode_groups=_decode_groups(decode, block_size, device),
        prompt_spans=_prompt_spans(prompts, len(decode), block_size, device),
    )
    return StepInputs(
        token_ids=torch.tensor([token_ids], device=device),
        positions=position_row.unsqueeze(0),
        sampled_rows=torch.tensor(sampled_rows, dtype=torch.long, device=device),
        sampled_chunks=tuple(chunk for chunk in chunks if chunk.sampling is not None),
        attention=attention,
    )


def _used_blocks(chunk: ScheduledChunk, block_size: int) -> tuple[int, ...]:
    return chunk.block_table[: _num_blocks(chunk, block_size)]


def _num_blocks(chunk: ScheduledChunk, block_size: int) -> int:
    return -(-chunk.end // block_size)


def _decode_groups(decode: Sequence[ScheduledChunk], block_size: int, device: str) -> tuple[DecodeGroup, ...]:
    """Groups sequences whose block counts round up to the same power of two, so that padding at most doubles work."""
    groups = []
    first_row = 0
    for _, members in groupby(decode, key=lambda chunk: (_num_blocks(chunk, block_size) - 1).bit_length()):
        chunks = list(members)
        groups.append(_decode_group(first_row, chunks, block_size, device))
        first_row += len(chunks)
    return tuple(groups)


def _decode_group(first_row: int, chunks: Sequence[ScheduledChunk], block_size: int, device: str) -> DecodeGroup:
    width = _num_blocks(chunks[-1], block_size)  # the longest is last
    tables = [_used_blocks(chunk, block_size) for chunk in chunks]
    # Padded with a block of its own: even a masked read must not see what another sequence computed.
    padded = [table + table[:1] * (width - len(table)) for table in tables]
    lengths = torch.tensor([chunk.end for chunk in chunks], device=device)
    mask = torch.arange(width * block_size, device=device) < lengths.unsqueeze(1)
    return DecodeGroup(first_row, torch.tensor(padded, device=device), mask.view(len(chunks), 1, 1, width * block_size))


def _prompt_spans(
    prompts: Sequence[ScheduledChunk], first_row: int, block_size: int, device: str
) -> tuple[PromptSpan, ...]:
    spans = []
    for chunk in prompts:
        block_ids = torch.tensor(_used_blocks(chunk, block_size), dtype=torch.long, device=device)
        spans.append(PromptSpan(first_row, len(chunk.token_ids), chunk.start, block_ids))
        first_row += len(chunk.token_ids)
    return tuple(spans)
