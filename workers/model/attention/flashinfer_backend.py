"""Paged attention by FlashInfer (Ye et al., MLSys 2025), on CUDA; for one step, or inside a CUDA graph.

Written against flashinfer-python 0.7.2. One layer of our cache, ``[num_blocks, 2, num_kv_heads, block_size,
head_size]``, is what FlashInfer calls a combined paged KV cache in HND layout, so no bytes are moved for it.
Decoding sequences go through its decode wrapper and prompts through its prefill wrapper, on two parts of the same row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvcache.spec import KVCacheSpec
from scheduler.step_plan import ScheduledChunk, StepPlan
from workers.model.attention.page_tables import (
    PageTable,
    StepTables,
    build_page_table,
    build_step_tables,
    new_blocks,
)
from workers.model.attention_layers import LayerAttention
from workers.model.step_inputs import StepInputs, build_step_inputs

LAYOUT = "HND"
# For partial results of long contexts. 128 MiB is what its documentation recommends; wide models with many sequences
# in one CUDA graph need more, and it raises when there is too little.
WORKSPACE_BYTES = 384 << 20


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one plan of FlashInfer covers: all layers for which this is the same."""

    layer: LayerAttention
    scale: float
    num_heads: int
    query_dtype: torch.dtype
    cache_dtype: torch.dtype

    @classmethod
    def of(cls, layer: LayerAttention, scale: float, query: torch.Tensor, cache: torch.Tensor) -> LayerShape:
        return cls(layer, scale, query.shape[1], query.dtype, cache.dtype)

    @property
    def options(self) -> dict[str, object]:
        window = self.layer.window
        return {
            "pos_encoding_mode": "NONE",  # the model has rotated queries and keys already
            "window_left": window - 1 if window is not None else -1,  # theirs does not count the token itself
            "logits_soft_cap": self.layer.softcap,
            "sm_scale": self.scale,
            "q_data_type": self.query_dtype,
            "kv_data_type": self.cache_dtype,
        }


@dataclass(frozen=True, slots=True)
class _DeviceTables:
    """Where new keys and values go. On the device."""

    pages: PageTable
    row_sequences: torch.Tensor  # int32 [T]
    row_positions: torch.Tensor  # int32 [T]
    wiped_blocks: torch.Tensor  # int64: blocks that get their first token

    def store(self, library: Any, cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        # A kernel may multiply what it masked by 0, and 0 * NaN is NaN.
        cache.index_fill_(0, self.wiped_blocks, 0)
        library.append_paged_kv_cache(
            key.contiguous(),
            value.contiguous(),
            self.row_sequences,
            self.row_positions,
            cache,
            self.pages.indices,
            self.pages.indptr,
            self.pages.last_page_len,
            kv_layout=LAYOUT,
        )


class FlashInferAttention:
    """The ``AttentionBackend`` for CUDA. FlashInfer's wrappers are kept: each has buffers of its own.

    ``library`` is the ``flashinfer`` module, which ships no types.
    """

    def __init__(self, library: Any, device: str) -> None:
        self.library = library
        self.device = device
        # Zeros, as FlashInfer asks. Shared by all wrappers: they run one after the other.
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._decode: dict[LayerShape, Any] = {}
        self._prefill: dict[LayerShape, Any] = {}

    def plan(self, plan: StepPlan, spec: KVCacheSpec, windows: Collection[int | None] = (None,)) -> FlashInferStep:
        """See ``AttentionBackend.plan``. Windows are planned for when their first layer comes."""
        inputs = build_step_inputs(plan, spec.block_size, self.device, windows=())
        return FlashInferStep(self, inputs, build_step_tables(plan, spec.block_size), spec)

    def plan_decode(self, shape: LayerShape, pages: PageTable, spec: KVCacheSpec) -> Any:
        """A wrapper that is ready to run decoding sequences."""
        if shape not in self._decode:
            self._decode[shape] = self.library.BatchDecodeWithPagedKVCacheWrapper(
                self.workspace,
                LAYOUT,
                use_tensor_cores=True,  # its other kernel knows only some ratios of heads to KV heads
            )
        plan_decode(self._decode[shape], shape, pages, spec)
        return self._decode[shape]

    def plan_prefill(self, shape: LayerShape, query_indptr: torch.Tensor, pages: PageTable, spec: KVCacheSpec) -> Any:
        """A wrapper that is ready to run prompt chunks."""
        if shape not in self._prefill:
            self._prefill[shape] = self.library.BatchPrefillWithPagedKVCacheWrapper(self.workspace, LAYOUT)
        wrapper = self._prefill[shape]
        wrapper.plan(
            query_indptr,
            pages.indptr,
            pages.indices,
            pages.last_page_len,
            shape.num_heads,
            spec.num_kv_heads,
            spec.head_size,
            spec.block_size,
            causal=True,
            **shape.options,
        )
        return wrapper


def plan_decode(wrapper: Any, shape: LayerShape, pages: PageTable, spec: KVCacheSpec) -> None:
    """Host arrays on purpose: given device arrays, FlashInfer would wait for the device to read them back."""
    wrapper.plan(
        pages.indptr,
        pages.indices,
        pages.last_page_len,
        shape.num_heads,
        spec.num_kv_heads,
        spec.head_size,
        spec.block_size,
        **shape.options,
    )


class FlashInferStep:
    """One step, planned for each kind of layer when the first layer of that kind comes."""

    def __init__(self, backend: FlashInferAttention, inputs: StepInputs, tables: StepTables, spec: KVCacheSpec) -> None:
        self.inputs = inputs
        self._backend = backend
        self._tables = tables
        self._spec = spec
        device, pages = backend.device, tables.pages
        self._device_tables = _DeviceTables(
            PageTable(pages.indptr.to(device), pages.indices.to(device), pages.last_page_len.to(device)),
            tables.row_sequences.to(device),
            tables.row_positions.to(device),
            tables.new_blocks.to(device),
        )
        self._planned: dict[LayerShape, tuple[Any | None, Any | None]] = {}

    def attend(
        self,
        cache: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: LayerAttention,
        scale: float,
    ) -> torch.Tensor:
        """See ``StepAttention.attend``."""
        self._device_tables.store(self._backend.library, cache, key, value)
        decode, prefill = self._wrappers(LayerShape.of(layer, scale, query, cache))
        query = query.contiguous()
        output = torch.empty_like(query)
        num_decode = self._tables.num_decode
        if decode is not None:
            decode.run(query[:num_decode], cache, out=output[:num_decode])
        if prefill is not None:
            prefill.run(query[num_decode:], cache, out=output[num_decode:])
        return output

    def _wrappers(self, shape: LayerShape) -> tuple[Any | None, Any | None]:
        if shape not in self._planned:
            self._planned[shape] = self._plan(shape)
        return self._planned[shape]

    def _plan(self, shape: LayerShape) -> tuple[Any | None, Any | None]:
        tables = self._tables
        num_decode, num_sequences = tables.num_decode, tables.num_sequences
        decode = prefill = None
        if num_decode:
            decode = self._backend.plan_decode(shape, tables.pages.part(0, num_decode), self._spec)
        if num_decode < num_sequences:
            query_indptr = tables.query_indptr[num_decode:] - num_decode
            pages = tables.pages.part(num_decode, num_sequences)
            prefill = self._backend.plan_prefill(shape, query_indptr, pages, self._spec)
        return decode, prefill


class FlashInferDecodeSlots:
    """``StepAttention`` of a fixed number of decoding sequences, whose arrays never move: a CUDA graph may record it.

    ``fill`` comes before each run of the model, outside the graph. The first run must not be recorded: it shows which
    kinds of layers there are, and FlashInfer's plans cannot be made inside a graph.
    """

    def __init__(self, backend: FlashInferAttention, num_slots: int, max_blocks_per_sequence: int) -> None:
        self.num_slots = num_slots
        self._backend = backend
        device = backend.device
        self._tables = _DeviceTables(
            PageTable(
                torch.zeros(num_slots + 1, dtype=torch.int32, device=device),
                torch.zeros(num_slots * max_blocks_per_sequence, dtype=torch.int32, device=device),
                torch.zeros(num_slots, dtype=torch.int32, device=device),
            ),
            torch.arange(num_slots, dtype=torch.int32, device=device),
            torch.zeros(num_slots, dtype=torch.int32, device=device),
            torch.zeros(num_slots, dtype=torch.int64, device=device),
        )
        self._wrappers: dict[LayerShape, Any] = {}
        self._host_pages: PageTable | None = None
        self._spec: KVCacheSpec | None = None

    def fill(self, chunks: Sequence[ScheduledChunk], scratch_block: int, spec: KVCacheSpec) -> None:
        """Takes over ``num_slots`` chunks of one token each. ``scratch_block`` is nobody's: it may be wiped."""
        assert len(chunks) == self.num_slots, "slots that nobody uses are filled by the caller"
        pages = build_page_table(chunks, spec.block_size)
        wiped = [(*new_blocks(chunk, spec.block_size), scratch_block)[0] for chunk in chunks]
        tables = self._tables
        tables.wiped_blocks.copy_(torch.tensor(wiped))
        tables.row_positions.copy_(torch.tensor([chunk.start for chunk in chunks], dtype=torch.int32))
        tables.pages.indptr.copy_(pages.indptr)
        tables.pages.indices[: len(pages.indices)].copy_(pages.indices)
        tables.pages.last_page_len.copy_(pages.last_page_len)
        self._host_pages, self._spec = pages, spec
        for shape, wrapper in self._wrappers.items():
            plan_decode(wrapper, shape, pages, spec)

    def attend(
        self,
        cache: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: LayerAttention,
        scale: float,
    ) -> torch.Tensor:
        """See ``StepAttention.attend``."""
        self._tables.store(self._backend.library, cache, key, value)
        query = query.contiguous()
        output = torch.empty_like(query)
        self._wrapper(LayerShape.of(layer, scale, query, cache)).run(query, cache, out=output)
        return output

    def _wrapper(self, shape: LayerShape) -> Any:
        if shape not in self._wrappers:
            assert self._host_pages is not None and self._spec is not None, "fill was not called"
            self._wrappers[shape] = self._backend.library.BatchDecodeWithPagedKVCacheWrapper(
                self._backend.workspace,
                LAYOUT,
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=self._tables.pages.indptr,
                paged_kv_indices_buffer=self._tables.pages.indices,
                paged_kv_last_page_len_buffer=self._tables.pages.last_page_len,
            )
            plan_decode(self._wrappers[shape], shape, self._host_pages, self._spec)
        return self._wrappers[shape]
