"""What a model asks of paged attention, whoever computes it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch

from kvcache.spec import KVCacheSpec
from scheduler.step_plan import StepPlan
from workers.model.attention_layers import LayerAttention
from workers.model.step_inputs import StepInputs


class StepAttention(Protocol):
    """The attention of all layers of one step."""

    def attend(
        self,
        cache: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: LayerAttention,
        scale: float,
    ) -> torch.Tensor:
        """Stores the new keys and values, then lets every query attend to its own sequence up to itself.

        A block that gets its first token is wiped first, so that nothing an earlier owner left is ever read.

        Args:
            cache: one layer of ``PagedStorage``, changed in place.
            query: ``[T, num_heads, head_size]``, in the order of the packed row.
            key, value: ``[T, num_kv_heads, head_size]``; ``num_heads`` is a multiple of ``num_kv_heads``.
            layer: its window and soft cap; the window is one of those that the step was planned for.
            scale: multiplies query-key products, before they are capped.

        Returns:
            ``[T, num_heads, head_size]``.
        """
        ...


class PlannedStep(StepAttention, Protocol):
    """One step as it comes."""

    inputs: StepInputs  # the packed row


class AttentionBackend(Protocol):
    """Prepares steps. One thread at a time; a planned step is used up before the next is planned."""

    def plan(self, plan: StepPlan, spec: KVCacheSpec, windows: Collection[int | None] = (None,)) -> PlannedStep:
        """Called once per step, before the first layer. ``windows`` are those of the model's layers."""
        ...
