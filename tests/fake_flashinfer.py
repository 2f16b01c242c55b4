"""Stands for the ``flashinfer`` module, on a CPU: the same calls on the same arrays, number by number in plain torch.

The signatures are those of flashinfer-python 0.7.2, without the parameters that belong to other features;
``tests/gpu/test_flashinfer.py`` compares them with the module that is installed. What FlashInfer asks of its arguments
is asserted here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``plan`` was told."""

    query_indptr: list[int]
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    causal: bool
    options: dict[str, Any]


@dataclass
class FakeFlashInfer:
    """The module. ``plans`` and ``arrays`` are what its callers did, in order."""

    plans: list[Plan] = field(default_factory=list)
    arrays: list[tuple[int, ...]] = field(default_factory=list)  # addresses of the arrays of each append
    is_recording: bool = False  # inside a CUDA graph nothing can be planned

    def BatchDecodeWithPagedKVCacheWrapper(self, *args: Any, **kwargs: Any) -> DecodeWrapper:
        return DecodeWrapper(self, *args, **kwargs)

    def BatchPrefillWithPagedKVCacheWrapper(self, *args: Any, **kwargs: Any) -> PrefillWrapper:
        return PrefillWrapper(self, *args, **kwargs)

    def append_paged_kv_cache(
        self,
        append_key: torch.Tensor,
        append_value: torch.Tensor,
        batch_indices: torch.Tensor,
        positions: torch.Tensor,
        paged_kv_cache: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_last_page_len: torch.Tensor,
        kv_layout: str = "NHD",
    ) -> None:
        assert kv_layout == "HND"
        arrays = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
        check_int32(*arrays)
        assert len(batch_indices) == len(positions) == len(append_key) == len(append_value)
        assert len(kv_indptr) == len(kv_last_page_len) + 1
        self.arrays.append(tuple(array.data_ptr() for array in (*arrays, paged_kv_cache)))
        page_size = paged_kv_cache.shape[3]
        rows = zip(batch_indices.tolist(), positions.tolist(), append_key, append_value, strict=True)
        for sequence, position, key, value in rows:
            first, last = kv_indptr[sequence : sequence + 2].tolist()
            assert position < (last - first - 1) * page_size + int(kv_last_page_len[sequence])
            page = int(kv_indices[first + position // page_size])
            paged_kv_cache[page, 0, :, position % page_size] = key
            paged_kv_cache[page, 1, :, position % page_size] = value

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.is_recording = True
        yield
        self.is_recording = False


def check_int32(*arrays: torch.Tensor) -> None:
    for array in arrays:
        assert array.dtype == torch.int32 and array.ndim == 1 and array.is_contiguous()


class _Wrapper:
    _library: FakeFlashInfer
    _plan: Plan
    _indptr: torch.Tensor
    _indices: torch.Tensor
    _last_page_len: torch.Tensor

    def _keep(self, plan: Plan) -> None:
        assert not self._library.is_recording, "FlashInfer cannot plan inside a CUDA graph"
        assert plan.options.pop("pos_encoding_mode") == "NONE"
        self._library.plans.append(plan)
        self._plan = plan

    def _check(self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> None:
        check_int32(indptr, indices, last_page_len)
        assert all(array.device.type == "cpu" for array in (indptr, indices, last_page_len))
        assert len(indptr) == len(last_page_len) + 1 and len(indices) == int(indptr[-1])
        assert bool(((last_page_len >= 1) & (last_page_len <= page_size)).all())

    def _run(self, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        plan = self._plan
        assert q.is_contiguous() and out.is_contiguous()
        assert (q.dtype, cache.dtype) == (plan.options["q_data_type"], plan.options["kv_data_type"])
        assert q.shape == (plan.query_indptr[-1], plan.num_qo_heads, plan.head_dim)
        assert cache.shape[1:] == (2, plan.num_kv_heads, plan.page_size, plan.head_dim)
        for sequence, (begin, end) in enumerate(zip(plan.query_indptr[:-1], plan.query_indptr[1:], strict=True)):
            pages = self._indices[self._indptr[sequence] : self._indptr[sequence + 1]].long()
            num_tokens = (len(pages) - 1) * plan.page_size + int(self._last_page_len[sequence])
            # [pages, 2, kv_heads, page_size, head_dim] -> 2 x [kv_heads, tokens, head_dim]
            keys, values = cache[pages].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :num_tokens].float()
            for row in range(begin, end):
                position = num_tokens - (end - row) if plan.causal else num_tokens - 1
                out[row] = self._attend_one(q[row].float(), keys, values, position).to(out.dtype)
        return out

    def _attend_one(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int) -> torch.Tensor:
        options = self._plan.options
        first = max(0, position - options["window_left"]) if options["window_left"] >= 0 else 0
        group = self._plan.num_qo_heads // self._plan.num_kv_heads
        heads = []
        for head in range(self._plan.num_qo_heads):
            products = keys[head // group, first : position + 1] @ query[head] * options["sm_scale"]
            if options["logits_soft_cap"]:
                products = options["logits_soft_cap"] * torch.tanh(products / options["logits_soft_cap"])
            heads.append(torch.softmax(products, dim=0) @ values[head // group, first : position + 1])
        return torch.stack(heads)


class DecodeWrapper(_Wrapper):
    def __init__(
        self,
        library: FakeFlashInfer,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        assert kv_layout == "HND" and float_workspace_buffer.dtype == torch.uint8
        assert use_tensor_cores, "the other kernel knows few ratios of heads"
        self._library = library
        self._fixed = None
        if use_cuda_graph:
            assert paged_kv_indptr_buffer is not None
            assert paged_kv_indices_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
            self._fixed = len(paged_kv_last_page_len_buffer)
            self._indptr, self._indices = paged_kv_indptr_buffer, paged_kv_indices_buffer
            self._last_page_len = paged_kv_last_page_len_buffer

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        self._check(indptr, indices, last_page_len, page_size)
        batch_size = len(last_page_len)
        if self._fixed is None:
            self._indptr, self._indices, self._last_page_len = indptr, indices, last_page_len
        else:
            assert batch_size == self._fixed, "a graph's batch size is fixed"
            assert len(indices) <= len(self._indices)
            self._indptr.copy_(indptr)
            self._indices[: len(indices)].copy_(indices)
            self._last_page_len.copy_(last_page_len)
        options = {
            "pos_encoding_mode": pos_encoding_mode,
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "q_data_type": q_data_type,
            "kv_data_type": kv_data_type or q_data_type,
            "sm_scale": sm_scale or 1 / math.sqrt(head_dim),
        }
        rows = list(range(batch_size + 1))
        self._keep(Plan(rows, num_qo_heads, num_kv_heads, head_dim, page_size, False, options))

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return self._run(q, paged_kv_cache, out)


class PrefillWrapper(_Wrapper):
    def __init__(self, library: FakeFlashInfer, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        assert kv_layout == "HND" and float_workspace_buffer.dtype == torch.uint8
        self._library = library

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        check_int32(qo_indptr)
        self._check(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        assert len(qo_indptr) == len(paged_kv_indptr)
        self._indptr, self._indices = paged_kv_indptr, paged_kv_indices
        self._last_page_len = paged_kv_last_page_len
        options = {
            "pos_encoding_mode": pos_encoding_mode,
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "q_data_type": q_data_type,
            "kv_data_type": kv_data_type or q_data_type,
            "sm_scale": sm_scale or 1 / math.sqrt(head_dim_qk),
        }
        self._keep(Plan(qo_indptr.tolist(), num_qo_heads, num_kv_heads, head_dim_qk, page_size, causal, options))

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return self._run(q, paged_kv_cache, out)
