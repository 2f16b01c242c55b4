"""A step as ragged page tables: what paged attention kernels on a GPU read. Everything here is in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from scheduler.step_plan import ScheduledChunk, StepPlan
from workers.model.step_inputs import packed_chunks


@dataclass(frozen=True, slots=True)
class PageTable:
    """The blocks of B sequences, one behind the other; all int32.

    ::

        indices        7 2 9 │ 4 │ 1 8       block table of each sequence, as far as it holds tokens
        indptr         0       3   4     6   where each begins, and the end
        last_page_len     5      16    1     tokens in the last block of each, 1 … block_size
    """

    indptr: torch.Tensor  # [B + 1]
    indices: torch.Tensor  # [indptr[B]]
    last_page_len: torch.Tensor  # [B]

    def part(self, first: int, last: int) -> PageTable:
        """Of sequences ``first`` to ``last - 1``. Shares memory with this one."""
        begin, end = int(self.indptr[first]), int(self.indptr[last])
        return PageTable(self.indptr[first : last + 1] - begin, self.indices[begin:end], self.last_page_len[first:last])


@dataclass(frozen=True, slots=True)
class StepTables:
    """One step: T tokens of B sequences, those that decode first."""

    num_decode: int
    pages: PageTable  # with the blocks of the new tokens
    query_indptr: torch.Tensor  # int32 [B + 1]: rows of each sequence in the packed row
    row_sequences: torch.Tensor  # int32 [T]: which sequence a row belongs to
    row_positions: torch.Tensor  # int32 [T]: its position there
    new_blocks: torch.Tensor  # int64: blocks that get their first token

    @property
    def num_sequences(self) -> int:
        return len(self.pages.last_page_len)


def build_step_tables(plan: StepPlan, block_size: int) -> StepTables:
    decode, prompts = packed_chunks(plan)
    chunks = decode + prompts
    lengths = [len(chunk.token_ids) for chunk in chunks]
    return StepTables(
        num_decode=len(decode),
        pages=build_page_table(chunks, block_size),
        query_indptr=_int32([0, *accumulate(lengths)]),
        row_sequences=torch.repeat_interleave(torch.arange(len(chunks), dtype=torch.int32), torch.tensor(lengths)),
        row_positions=torch.cat([torch.arange(chunk.start, chunk.end, dtype=torch.int32) for chunk in chunks]),
        new_blocks=torch.tensor(list(chain.from_iterable(new_blocks(chunk, block_size) for chunk in chunks))).long(),
    )


def build_page_table(chunks: Sequence[ScheduledChunk], block_size: int) -> PageTable:
    counts = [-(-chunk.end // block_size) for chunk in chunks]
    used = chain.from_iterable(chunk.block_table[:count] for chunk, count in zip(chunks, counts, strict=True))
    return PageTable(
        indptr=_int32([0, *accumulate(counts)]),
        indices=_int32(list(used)),
        last_page_len=_int32([(chunk.end - 1) % block_size + 1 for chunk in chunks]),
    )


def new_blocks(chunk: ScheduledChunk, block_size: int) -> tuple[int, ...]:
    """The blocks that get their first token by this chunk."""
    return chunk.block_table[-(-chunk.start // block_size) : -(-chunk.end // block_size)]


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
