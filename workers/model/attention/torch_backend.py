"""Paged attention in portable torch: the reference that every faster backend is compared with.

It is correct on any device and copies what every sequence attends to in every layer, so it is not fast. With a
window, the blocks before it are not read.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcache.rows import decode_rows, encode_rows
from kvcache.spec import KVCacheSpec
from scheduler.step_plan import StepPlan
from workers.model.attention_layers import LayerAttention
from workers.model.step_inputs import DecodeGroup, PagedAttentionInputs, PromptSpan, StepInputs, build_step_inputs

MAX_SCORES = 1 << 24  # held at once where scores must be written out: 64 MiB of float32


class TorchAttention:
    """The ``AttentionBackend`` that runs anywhere."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def plan(self, plan: StepPlan, spec: KVCacheSpec, windows: Collection[int | None] = (None,)) -> TorchStep:
        """See ``AttentionBackend.plan``."""
        return TorchStep(build_step_inputs(plan, spec.block_size, self._device, windows))


class TorchStep:
    """One step of it."""

    def __init__(self, inputs: StepInputs) -> None:
        self.inputs = inputs

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
        return paged_attention(query, key, value, cache, self.inputs.attention[layer.window], scale, layer.softcap)


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    inputs: PagedAttentionInputs,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Stores the new keys and values, then lets every query attend to its own sequence up to itself.

    Args:
        query: ``[T, num_heads, head_size]``.
        key, value: ``[T, num_kv_heads, head_size]``; ``num_heads`` is a multiple of ``num_kv_heads``.
        cache: ``[num_blocks, 2, num_kv_heads, block_size, row size]``, a layer of ``PagedStorage``, changed in place.
        inputs: for the window of this layer.
        scale: multiplies query-key products.
        softcap: bounds them then: ``softcap * tanh(score / softcap)``.

    Returns:
        ``[T, num_heads, head_size]``.
    """
    cache[inputs.new_blocks] = 0
    cache[inputs.write_blocks, 0, :, inputs.write_offsets] = encode_rows(key, cache.dtype)
    cache[inputs.write_blocks, 1, :, inputs.write_offsets] = encode_rows(value, cache.dtype)
    output = torch.empty_like(query)
    for group in inputs.decode_groups:
        rows = slice(group.first_row, group.first_row + len(group.block_ids))
        output[rows] = _decode(query[rows], cache, group, scale, softcap)
    for span in inputs.prompt_spans:
        rows = slice(span.first_row, span.first_row + span.num_rows)
        output[rows] = _prompt(query[rows], cache, span, scale, softcap)
    return output


def _decode(
    query: torch.Tensor, cache: torch.Tensor, group: DecodeGroup, scale: float, softcap: float | None
) -> torch.Tensor:
    """One query per sequence. The heads that share a KV head are treated as queries at one position."""
    num_seqs, num_heads, head_size = query.shape
    num_kv_heads = cache.shape[2]
    # [B, N, 2, kv_heads, block_size, head_size] -> 2 x [B, kv_heads, N * block_size, head_size]
    gathered = decode_rows(cache[group.block_ids], query.dtype).permute(2, 0, 3, 1, 4, 5)
    keys, values = gathered.reshape(2, num_seqs, num_kv_heads, -1, head_size)
    grouped = query.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_size)
    if softcap is not None:
        attended = _capped_attention(grouped, keys, values, group.mask, scale, softcap)
    else:
        attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=scale)
    return attended.reshape(num_seqs, num_heads, head_size)


def _prompt(
    query: torch.Tensor, cache: torch.Tensor, span: PromptSpan, scale: float, softcap: float | None
) -> torch.Tensor:
    """The chunk's queries against everything of the sequence that is in their window, up to and including the chunk."""
    num_kv_heads, head_size = cache.shape[2], query.shape[-1]
    # [N, 2, kv_heads, block_size, head_size] -> 2 x [kv_heads, 1, tokens, head_size]
    blocks = decode_rows(cache[span.block_ids], query.dtype)
    gathered = blocks.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_size)
    keys, values = gathered[:, :, : span.num_keys].unsqueeze(2)
    if softcap is not None:
        grouped = query.view(span.num_rows, num_kv_heads, -1, head_size).permute(1, 2, 0, 3)
        capped = _capped_prompt(grouped, keys, values, span.mask, scale, softcap)
        return capped.permute(2, 0, 1, 3).reshape(query.shape)
    attended = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1),
        values.transpose(0, 1),
        attn_mask=span.mask,
        is_causal=span.mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return attended.squeeze(0).transpose(0, 1)


def _capped_prompt(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """As many rows at a time as ``MAX_SCORES`` allows. ``query`` is ``[kv_heads, heads of each, rows, head_size]``."""
    num_heads, num_rows, num_keys = query.shape[0] * query.shape[1], query.shape[2], keys.shape[-2]
    if mask is None:
        mask = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query.device).tril()
    rows_at_once = max(1, MAX_SCORES // (num_heads * num_keys))
    parts = zip(query.split(rows_at_once, dim=2), mask.split(rows_at_once), strict=True)
    return torch.cat([_capped_attention(part, keys, values, seen, scale, softcap) for part, seen in parts], dim=2)


def _capped_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Attention with its scores written out, for torch's own does not cap them. Softmax in float32."""
    scores = (query @ keys.transpose(-1, -2)) * scale
    capped = (scores / softcap).tanh() * softcap
    weights = capped.float().masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return weights.to(values.dtype) @ values
