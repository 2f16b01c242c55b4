"""Cuts the modules of a transformers model to one rank's share, after the plan that transformers has for its model.

A column-parallel layer computes a range of its outputs; a row-parallel layer takes a range of its inputs, and the
ranks' results are summed (Shoeybi et al.: Megatron-LM, 2019). Attention is cut between heads. Embedding and output
head are cut by the vocabulary: a rank's logits are those of its range of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from kvcache.errors import ModelError
from kvcache.heads import Shard

AllReduce = Callable[[torch.Tensor], torch.Tensor]

COLUMNS, ROWS, PACKED_COLUMNS, SUMMED, WHOLE = (
    "colwise",
    "rowwise",
    "packed_colwise",
    "moe_tp_experts",
    "replicated_with_grad_allreduce",
)
STYLES = frozenset({COLUMNS, ROWS, PACKED_COLUMNS, SUMMED, WHOLE})
KEY_AND_VALUE = frozenset({"k_proj", "v_proj"})
ATTENTION_PARTS = KEY_AND_VALUE | {"q_proj", "o_proj"}


def find_plan_problem(plan: dict[str, str] | None) -> str | None:
    """Why a model with this plan (``base_model_tp_plan`` of its configuration) cannot be cut, or None."""
    if not plan:
        return "transformers has no tensor-parallel plan for it"
    for name, style in plan.items():
        if style not in STYLES:
            return f"its {name.rpartition('.')[2]} would be cut in a way that is not done here ({style})"
    attention = {name.rpartition(".")[2] for name in plan if "attn" in name.rpartition(".")[0]}
    if missing := ATTENTION_PARTS - attention:
        return f"its plan does not cut the attention's {', '.join(sorted(missing))}"
    return None


def cut_modules(model: Any, shard: Shard, all_reduce: AllReduce) -> None:
    """Replaces weights by this rank's part of them, in place, and sums where the plan says so.

    The parts are views of what was loaded where that is contiguous, so that of a mapped file only they are read.

    Raises:
        ModelError: a part of the model does not fit its plan.
    """
    problem = find_plan_problem(model.config.base_model_tp_plan)
    if problem is not None:
        raise ModelError(f"{type(model).__name__} cannot be cut for tensor parallelism: {problem}.")
    base = getattr(model, model.base_model_prefix)
    for pattern, style in model.config.base_model_tp_plan.items():
        for name in _matching(base, pattern):
            _cut(base, name, style, model.config, shard, all_reduce)
    _cut_vocabulary(model, shard, all_reduce)


def _matching(base: nn.Module, pattern: str) -> Iterator[str]:
    """Names of the modules and parameters that a plan's pattern stands for. A layer may lack one (dense, not MoE)."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    modules = [name for name, _ in base.named_modules()]
    parameters = [name for name, _ in base.named_parameters()]
    yield from [name for name in modules + parameters if expression.fullmatch(name)]


def _cut(base: nn.Module, name: str, style: str, config: Any, shard: Shard, all_reduce: AllReduce) -> None:
    owner, _, last = name.rpartition(".")
    target: Any = base.get_submodule(owner)
    part: Any = getattr(target, last)
    if style == COLUMNS and isinstance(part, nn.Linear):
        _keep_columns(part, _columns(part, name, config, shard))
        if last == "k_proj" and hasattr(target, "num_key_value_groups"):  # how transformers' own attention shares them
            heads, kv_heads = shard.of(config.num_attention_heads), shard.kv_heads(config.num_key_value_heads)
            target.num_key_value_groups = len(heads) // len(kv_heads)
    elif style == ROWS and isinstance(part, nn.Linear):
        _keep_rows(part, shard, all_reduce)
    elif style == PACKED_COLUMNS and isinstance(part, nn.Parameter):
        half = part.shape[-2] // 2
        kept = shard.of(half)
        rows = [part[..., first + kept.start : first + kept.stop, :] for first in (0, half)]
        _set(target, last, torch.cat(rows, dim=-2))
    elif style == ROWS and isinstance(part, nn.Parameter):
        kept = shard.of(part.shape[-1])
        _set(target, last, part[..., kept.start : kept.stop].contiguous())
    elif style == SUMMED and isinstance(part, nn.Module):
        part.register_forward_hook(lambda _module, _inputs, output: all_reduce(output))
    elif style != WHOLE:
        raise ModelError(f"{name} is a {type(part).__name__}, which cannot be cut as its plan says ({style}).")


def _columns(linear: nn.Linear, name: str, config: Any, shard: Shard) -> range:
    """The outputs that a rank keeps: of an attention, those of whole heads."""
    owner, _, last = name.rpartition(".")
    if "attn" not in owner:
        return shard.of(linear.out_features)
    num_heads = config.num_attention_heads
    if last in KEY_AND_VALUE:
        num_heads = getattr(config, "num_key_value_heads", None) or num_heads
        heads = shard.kv_heads(num_heads)
    else:
        heads = shard.of(num_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if linear.out_features != num_heads * head_size:
        raise ModelError(f"{name} has {linear.out_features} outputs, which are not {num_heads} heads of {head_size}.")
    return range(heads.start * head_size, heads.stop * head_size)


def _keep_columns(linear: nn.Linear, kept: range) -> None:
    _set(linear, "weight", linear.weight[kept.start : kept.stop])
    if linear.bias is not None:
        _set(linear, "bias", linear.bias[kept.start : kept.stop])
    linear.out_features = len(kept)


def _keep_rows(linear: nn.Linear, shard: Shard, all_reduce: AllReduce) -> None:
    kept = shard.of(linear.in_features)
    _set(linear, "weight", linear.weight[:, kept.start : kept.stop].contiguous())
    if linear.bias is not None and shard.rank > 0:
        _set(linear, "bias", torch.zeros_like(linear.bias))  # it is added once
    linear.in_features = len(kept)
    linear.register_forward_hook(lambda _module, _inputs, output: all_reduce(output))


def _cut_vocabulary(model: Any, shard: Shard, all_reduce: AllReduce) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        raise ModelError(f"{type(model).__name__} has no plain embedding and output head that could be cut.")
    tokens = shard.of(embedding.num_embeddings)
    is_tied = head.weight is embedding.weight
    _keep_columns(head, tokens)
    if is_tied:
        embedding.weight = head.weight
    else:
        _set(embedding, "weight", embedding.weight[tokens.start : tokens.stop])

    lookup = embedding.forward

    def forward(token_ids: torch.Tensor) -> torch.Tensor:
        row = token_ids - tokens.start
        is_here = (row >= 0) & (row < len(tokens))
        rows = lookup(row.clamp(0, len(tokens) - 1))
        return all_reduce(rows.masked_fill(~is_here.unsqueeze(-1), 0))

    embedding.forward = forward  # type: ignore[assignment]


def _set(module: nn.Module, name: str, values: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(values, requires_grad=False))
