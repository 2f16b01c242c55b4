"""One step as tensors: all sequences packed into one row, and where their KV is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
class PagedAttentionInputs:
    """What the attention of every layer needs in one step.

    ::

        packed row   d d d d │ p p p p p p p │ p p p        d: one token of a decoding sequence
                     └─ B ───┘ └─ span 0 ──┘ └ span 1 ┘     p: tokens of a prompt chunk

    Shapes: T tokens in the row, B decoding sequences, N blocks of the longest of them.
    """

    write_blocks: torch.Tensor  # int64 [T]: physical block of each token
    write_offsets: torch.Tensor  # int64 [T]: its place inside the block
    num_decode: int  # B
    decode_blocks: torch.Tensor  # int64 [B, N], padded with 0
    decode_mask: torch.Tensor  # bool [B, 1, 1, N * block_size]: True where a token is
    prompt_spans: tuple[PromptSpan, ...]


@dataclass(frozen=True, slots=True)
class StepInputs:
    token_ids: torch.Tensor  # int64 [1, T]
    positions: torch.Tensor  # int64 [1, T]
    sampled_rows: torch.Tensor  # int64 [S]: rows of the packed row whose logits are needed
    sampled_chunks: tuple[ScheduledChunk, ...]  # S chunks, in the same order
    attention: PagedAttentionInputs


def build_step_inputs(plan: StepPlan, block_size: int, device: str = "cpu") -> StepInputs:
    """Packs a plan. Single-token chunks come first in the row, in plan order."""
    decode = [chunk for chunk in plan.chunks if len(chunk.token_ids) == 1]
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
    attention = PagedAttentionInputs(
        write_blocks=torch.tensor(write_blocks, device=device),
        write_offsets=position_row % block_size,
        num_decode=len(decode),
        decode_blocks=_padded_tables(decode, block_size, device),
        decode_mask=_decode_mask(decode, block_size, device),
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
    return chunk.block_table[: -(-chunk.end // block_size)]


def _padded_tables(decode: Sequence[ScheduledChunk], block_size: int, device: str) -> torch.Tensor:
    tables = [_used_blocks(chunk, block_size) for chunk in decode]
    width = max((len(table) for table in tables), default=0)
    padded = [table + (0,) * (width - len(table)) for table in tables]
    return torch.tensor(padded, dtype=torch.long, device=device).view(len(decode), width)


def _decode_mask(decode: Sequence[ScheduledChunk], block_size: int, device: str) -> torch.Tensor:
    lengths = torch.tensor([chunk.end for chunk in decode], dtype=torch.long, device=device)
    width = max((-(-chunk.end // block_size) for chunk in decode), default=0) * block_size
    return (torch.arange(width, device=device) < lengths.unsqueeze(1)).view(len(decode), 1, 1, width)


def _prompt_spans(
    prompts: Sequence[ScheduledChunk], first_row: int, block_size: int, device: str
) -> tuple[PromptSpan, ...]:
    spans = []
    for chunk in prompts:
        block_ids = torch.tensor(_used_blocks(chunk, block_size), dtype=torch.long, device=device)
        spans.append(PromptSpan(first_row, len(chunk.token_ids), chunk.start, block_ids))
        first_row += len(chunk.token_ids)
    return tuple(spans)
