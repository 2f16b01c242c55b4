"""Paged attention in portable torch: the reference that every faster backend is compared with.

It is correct on any device and copies the context of every sequence in every layer, so it is not fast.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.model.step_inputs import DecodeGroup, PagedAttentionInputs, PromptSpan


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    inputs: PagedAttentionInputs,
    scale: float,
) -> torch.Tensor:
    """Stores the new keys and values, then lets every query attend to its own sequence up to itself.

    Args:
        query: ``[T, num_heads, head_size]``.
        key, value: ``[T, num_kv_heads, head_size]``; ``num_heads`` is a multiple of ``num_kv_heads``.
        cache: ``[num_blocks, 2, num_kv_heads, block_size, head_size]``, changed in place.
        scale: multiplies query-key products.

    Returns:
        ``[T, num_heads, head_size]``.
    """
    cache[inputs.new_blocks] = 0
    cache[inputs.write_blocks, 0, :, inputs.write_offsets] = key
    cache[inputs.write_blocks, 1, :, inputs.write_offsets] = value
    output = torch.empty_like(query)
    for group in inputs.decode_groups:
        rows = slice(group.first_row, group.first_row + len(group.block_ids))
        output[rows] = _decode(query[rows], cache, group, scale)
    for span in inputs.prompt_spans:
        rows = slice(span.first_row, span.first_row + span.num_rows)
        output[rows] = _prompt(query[rows], cache, span, scale)
    return output


def _decode(query: torch.Tensor, cache: torch.Tensor, group: DecodeGroup, scale: float) -> torch.Tensor:
    """One query per sequence. The heads that share a KV head are treated as queries at one position."""
    num_seqs, num_heads, head_size = query.shape
    num_kv_heads = cache.shape[2]
    # [B, N, 2, kv_heads, block_size, head_size] -> 2 x [B, kv_heads, N * block_size, head_size]
    gathered = cache[group.block_ids].permute(2, 0, 3, 1, 4, 5)
    keys, values = gathered.reshape(2, num_seqs, num_kv_heads, -1, head_size)
    grouped = query.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_size)
    attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=scale)
    return attended.reshape(num_seqs, num_heads, head_size)


def _prompt(query: torch.Tensor, cache: torch.Tensor, span: PromptSpan, scale: float) -> torch.Tensor:
    """The chunk's queries against everything of the sequence up to and including the chunk."""
    num_tokens = span.start + span.num_rows
    num_kv_heads, head_size = cache.shape[2], cache.shape[4]
    # [N, 2, kv_heads, block_size, head_size] -> 2 x [kv_heads, tokens, head_size]
    gathered = cache[span.block_ids].permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_size)
    keys, values = gathered[:, :, :num_tokens].unsqueeze(1)
    mask = None
    if span.start:
        positions = torch.arange(num_tokens, device=query.device)
        mask = positions <= positions[span.start :].unsqueeze(1)
    attended = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return attended.squeeze(0).transpose(0, 1)
