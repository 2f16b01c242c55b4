"""What a model is compared on before it serves: a way to run it that is wrong for one kind of rows is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.step_plan import StepPlan
from tests.families import FAMILIES, save_model
from workers.model.attention.interface import StepAttention
from workers.model.attention.torch_backend import TorchAttention
from workers.model.attention_layers import LayerAttention
from workers.model.comparison import RowKind, compared_logits, find_difference, kind_of, relative_differences
from workers.model.transformers_model import TransformersModel, load_model

VOCAB_SIZE = 97
SPEC = KVCacheSpec(num_layers=4, num_kv_heads=2, head_size=16, block_size=4, dtype="float32")


class BrokenStep:
    """Attends to nothing in some rows."""

    def __init__(self, step: StepAttention, broken: list[bool]) -> None:
        self.inputs = step.inputs
        self._step = step
        self._broken = torch.tensor(broken)

    def attend(
        self,
        cache: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: LayerAttention,
        scale: float,
    ) -> torch.Tensor:
        attended = self._step.attend(cache, query, key, value, layer, scale)
        attended[self._broken] = 0
        return attended


class BrokenAttention(TorchAttention):
    def __init__(self, kind: RowKind) -> None:
        super().__init__("cpu")
        self._kind = kind

    def plan(self, plan: StepPlan, spec: KVCacheSpec, windows: set[int | None]) -> BrokenStep:  # type: ignore[override]
        broken = [kind_of(chunk) is self._kind for chunk in plan.chunks for _ in chunk.token_ids]
        return BrokenStep(super().plan(plan, spec, windows), broken)


@pytest.mark.parametrize("kind", RowKind)
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "fp8")])
def test_attention_that_is_wrong_for_one_kind_of_rows_is_found(
    tmp_path: Path, name: str, kind: RowKind, dtype: str, kv_dtype: str
) -> None:
    save_model(tmp_path, FAMILIES[name](VOCAB_SIZE))
    model = load_model(tmp_path, dtype)
    expected, spec = compared_logits(model), KVCacheSpec(4, 2, 16, 4, kv_dtype)
    assert find_difference(model, TransformersModel(model), expected, spec) is None
    broken = TransformersModel(model, attention=BrokenAttention(kind))
    assert find_difference(model, broken, expected, spec) is not None


class OneRowWrong:
    """As when a token goes to another expert: the rest of its step is right."""

    def __init__(self, model: TransformersModel) -> None:
        self._model = model

    def logits(self, plan: StepPlan, storage: PagedStorage, progress: None = None) -> torch.Tensor:
        logits = self._model.logits(plan, storage, progress).clone()
        logits[0] = -logits[0]
        return logits


@pytest.mark.parametrize(("name", "is_found"), [("llama", True), ("mixtral", False)])
def test_a_single_wrong_row_says_nothing_among_experts_only(tmp_path: Path, name: str, is_found: bool) -> None:
    save_model(tmp_path, FAMILIES[name](VOCAB_SIZE))
    model = load_model(tmp_path, "float32")
    wrong = OneRowWrong(TransformersModel(model))
    assert (find_difference(model, wrong, compared_logits(model), SPEC) is not None) == is_found


def test_a_median_is_one_of_several_rows(tmp_path: Path) -> None:
    save_model(tmp_path, FAMILIES["llama"](VOCAB_SIZE))
    model = load_model(tmp_path, "float32")
    differences = relative_differences(compared_logits(model), TransformersModel(model), SPEC, VOCAB_SIZE)
    assert differences.keys() == set(RowKind)
    assert min(map(len, differences.values())) >= 7
