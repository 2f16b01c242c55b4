"""A step of a real, tiny model: what happens to logits that are not numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kvcache.errors import ModelError
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.request import SamplingParams
from scheduler.step_plan import ScheduledChunk, StepPlan
from workers.model.runner import ModelRunner, choose_step_model
from workers.model.sampler import NotFiniteError
from workers.model.transformers_model import TransformersModel, load_model

POISON = 7
SPEC = KVCacheSpec(num_layers=2, num_kv_heads=1, head_size=16, block_size=4, dtype="float32")
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


@pytest.fixture
def storage() -> PagedStorage:
    return PagedStorage(SPEC, num_blocks=8)


@pytest.fixture
def runner(tmp_path: Path, storage: PagedStorage) -> ModelRunner:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=SPEC.num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, "float32")
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("nan")  # type: ignore[operator]
    return ModelRunner(TransformersModel(model), storage)


def chunk(request_id: str, token_ids: tuple[int, ...], start: int, block_table: tuple[int, ...]) -> ScheduledChunk:
    return ScheduledChunk(request_id, token_ids, start, len(token_ids), block_table, GREEDY)


def test_a_sequence_whose_logits_are_not_finite_gets_no_token(runner: ModelRunner) -> None:
    with pytest.raises(NotFiniteError):
        runner.execute(StepPlan((chunk("bad", (1, POISON, 2), 0, (0,)), chunk("good", (1, 2, 3), 0, (1,)))))


def test_what_a_poisoned_sequence_left_cannot_spoil_the_next_owner(runner: ModelRunner, storage: PagedStorage) -> None:
    expected = runner.execute(StepPlan((chunk("good", (1, 2, 3, 4, 5, 6), 0, (2, 3)),)))
    with pytest.raises(NotFiniteError):
        runner.execute(StepPlan((chunk("bad", (POISON,) * 8, 0, (0, 1)),)))
    assert all(layer[:2].isnan().all() for layer in storage.layers[1:])
    runner.execute(StepPlan((chunk("good", (1, 2, 3, 4, 5), 0, (0, 1)),)))
    assert runner.execute(StepPlan((chunk("good", (6,), 5, (0, 1)),))) == expected
    assert not any(layer[:2].isnan().any() for layer in storage.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("lm_head.weight"), r"lacks 1 of the model's weights \(lm_head.weight\)"),
        (lambda state: state.update(more=torch.zeros(1)), r"has 1 tensors too many \(more\)"),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(31)}),
            r"has 1 tensors of another shape .*\(model.norm.weight: \[31\] and not \[32\]\)",
        ),
    ],
)
def test_a_checkpoint_whose_tensors_are_not_the_model_s_is_refused(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    """transformers would fill them with random numbers, or pass over them, and the server would answer nonsense."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, "float32")
    assert not caplog.records  # transformers would say that it filled them


def test_weights_that_are_not_finite_are_named_and_so_is_where_they_lie(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).eval()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    folder = tmp_path / "damaged-llama"
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"weight model\.norm\.weight in damaged-llama has values that are not finite"):
        choose_step_model(load_model(folder, "float32"), KVCacheSpec(1, 2, 16, 16, "float32"), 64, 1)


def test_logits_that_are_all_zero_are_refused_and_so_is_where_they_come_from(tmp_path: Path) -> None:
    """As of a file whose tail is zeros: any token would be the likeliest."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).eval()
    torch.nn.init.zeros_(model.model.norm.weight)
    folder = tmp_path / "damaged-llama"
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"All logits of the model in damaged-llama are zero"):
        choose_step_model(load_model(folder, "float32"), KVCacheSpec(1, 2, 16, 16, "float32"), 64, 1)


def test_weights_stored_as_they_are_computed_with_are_the_mapped_file(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "float32")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    bounds = [[int(end, 16) for end in fields[0].split("-")] for fields in maps]
    for name, weight in loaded.named_parameters():
        assert any(start <= weight.data_ptr() < end for start, end in bounds), name


def test_loading_tells_of_every_weight(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    count = len(model.state_dict())
    parts: list[float] = []
    load_model(tmp_path, "float32", report=parts.append)
    assert parts == pytest.approx([*((number + 1) / count for number in range(count)), 1.0])


def test_a_checkpoint_in_shards_is_loaded_whole(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load_model(tmp_path, "float32").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
