"""What a step needs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from kvcache.storage import PagedStorage
from scheduler.step_plan import StepPlan
from workers.step_progress import StepProgress


class StepModel(Protocol):
    """A model with a paged KV cache behind it."""

    def logits(self, plan: StepPlan, storage: PagedStorage, progress: StepProgress | None = None) -> torch.Tensor:
        """Computes the chunks of ``plan`` and fills their KV in ``storage``, telling ``progress`` of each layer.

        Returns:
            ``[S, vocabulary]``: for each chunk, in the order of the plan, the logits after the last ``num_logits``
            of its tokens. They are the caller's.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a step computed."""

    logits: torch.Tensor  # as ``StepModel.logits``
    likeliest: list[int] | None = None  # of each row, as ``rows.likeliest``, where the model has looked for it already


class PreparedInputs(Protocol):
    """A plan in the model's own form."""

    def set_tokens(self, token_ids: Sequence[int]) -> None:
        """Of a step that was planned ahead: one for each of its sequences, in their order."""
        ...


@runtime_checkable
class PreparingModel(StepModel, Protocol):
    """One whose inputs can be made while another step runs. Inputs are of the model that made them."""

    def prepare(self, plan: StepPlan, storage: PagedStorage) -> Any:
        """Returns ``PreparedInputs``. Any thread may call it."""
        ...

    def run(self, inputs: Any, progress: StepProgress | None) -> StepLogits:
        """What ``logits`` does, with inputs that are there. Once for each of them."""
        ...
