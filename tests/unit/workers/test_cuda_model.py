"""What a GPU worker decides when it loads, as far as that needs no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvcache.errors import ResourceError
from kvcache.heads import Shard
from scheduler.batching import BatchLimits
from scheduler.types import WorkerRole
from tests.builders import make_shape
from tests.fake_flashinfer import FakeFlashInfer
from tests.tiny_model import VOCAB_SIZE, tiny_llama, tiny_spec
from workers.model import cuda_model
from workers.model.attention.flashinfer_backend import FlashInferAttention
from workers.model.attention.torch_backend import TorchAttention
from workers.model.cuda_graphs import GraphedModel, Replay
from workers.model.cuda_model import budget_bytes, choose_cuda_model, largest_step, run_on_gpu
from workers.model.transformers_model import TransformersModel
from workers.worker_options import WorkerOptions

SPEC = tiny_spec(head_size=64, dtype="bfloat16")
MIB = 1 << 20
MAX_MODEL_LEN = 32


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    return tiny_llama(tmp_path, SPEC)


def choose(model: nn.Module, monkeypatch: pytest.MonkeyPatch, library: object | None) -> object:
    monkeypatch.setattr(cuda_model, "import_flashinfer", lambda: library)
    return choose_cuda_model(model, SPEC, MAX_MODEL_LEN, "cpu").attention


def test_flashinfer_is_taken_where_its_logits_are_right(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(choose(model, monkeypatch, FakeFlashInfer()), FlashInferAttention)
    assert not caplog.records


def test_without_flashinfer_one_warning_names_the_extra(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(choose(model, monkeypatch, None), TorchAttention)
    (record,) = caplog.records
    assert "twinpool[gpu]" in record.getMessage()


class WrongFlashInfer(FakeFlashInfer):
    def append_paged_kv_cache(
        self, append_key: torch.Tensor, append_value: torch.Tensor, *args: Any, **kw: Any
    ) -> None:
        super().append_paged_kv_cache(append_value, append_key, *args, **kw)


class BrokenFlashInfer(FakeFlashInfer):
    def append_paged_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Could not find nvcc\nand default cuda_home='/usr/local/cuda' does not exist")


@pytest.mark.parametrize(
    ("library", "words"),
    [(WrongFlashInfer(), "its logits differ by"), (BrokenFlashInfer(), "Could not find nvcc and default")],
    ids=["wrong", "broken"],
)
def test_a_flashinfer_that_does_not_do_is_left_with_the_reason(
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    library: FakeFlashInfer,
    words: str,
) -> None:
    assert isinstance(choose(model, monkeypatch, library), TorchAttention)
    (record,) = caplog.records
    assert words in record.getMessage()


class Others:
    """The other ranks of a group, from one of them: what they answer when the largest value is asked for."""

    def __init__(self, *answers: float) -> None:
        self.shard = Shard()
        self.told: list[float] = []
        self._answers = iter(answers)

    def largest(self, value: float) -> float:
        self.told.append(value)
        return max(value, next(self._answers))


def test_a_rank_tells_the_others_that_its_flashinfer_failed(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    others: Any = Others(1.0, 0.0, 0.0)  # of the model's own logits, with FlashInfer, and portable
    monkeypatch.setattr(cuda_model, "import_flashinfer", BrokenFlashInfer)
    chosen = choose_cuda_model(model, SPEC, MAX_MODEL_LEN, "cpu", others)
    assert isinstance(chosen.attention, TorchAttention) and others.told[1] == math.inf
    assert "Could not find nvcc" in caplog.text


def test_what_failed_in_another_rank_is_left_here_too(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    others: Any = Others(1.0, math.inf, 0.0)
    monkeypatch.setattr(cuda_model, "import_flashinfer", FakeFlashInfer)
    assert isinstance(choose_cuda_model(model, SPEC, MAX_MODEL_LEN, "cpu", others).attention, TorchAttention)
    assert others.told[1] < 0.05, "it was FlashInfer here that was wrong"


@pytest.mark.parametrize(
    ("used", "step", "utilization", "expected"),
    [(20, 5, 0.9, 65), (20, 5, 1.0, 75), (80, 15, 0.9, 0), (50, 40, 0.9, 0)],
)
def test_the_kv_cache_gets_what_others_the_weights_and_a_step_leave(
    used: int, step: int, utilization: float, expected: int
) -> None:
    assert budget_bytes(100 * MIB, used * MIB, step * MIB, utilization) == expected * MIB


@pytest.mark.parametrize(
    ("seqs", "tokens", "max_model_len", "expected"),
    [(8, 64, 100, [8] * 8), (64, 8, 100, [1] * 8), (2, 64, 16, [16] * 2), (3, 10, 100, [3] * 3)],
)
def test_the_largest_step_has_the_most_sequences_and_tokens_that_fit(
    seqs: int, tokens: int, max_model_len: int, expected: list[int]
) -> None:
    plan = largest_step(BatchLimits(seqs, tokens), max_model_len, block_size=4)
    assert [len(chunk.token_ids) for chunk in plan.chunks] == expected
    blocks = [block for chunk in plan.chunks for block in chunk.block_table]
    assert sorted(blocks) == list(range(len(blocks))) and all(chunk.sampling for chunk in plan.chunks)
    assert all(len(chunk.block_table) == -(-chunk.end // 4) for chunk in plan.chunks)


class CallingRecorder:
    """A recording is played by calling again."""

    def record(self, run: Callable[[], torch.Tensor]) -> Replay:
        run()
        return run


def options_for(role: WorkerRole) -> WorkerOptions:
    """The device is the CPU: what else CUDA would be asked for is replaced by ``gpu_of``."""
    return WorkerOptions(
        "worker",
        role,
        "nowhere",
        "tiny",
        SPEC,
        make_shape(SPEC),
        num_blocks=None,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        dtype=SPEC.dtype,
        limits=BatchLimits(2, 16),
        gpu_memory_utilization=0.5,
    )


def gpu_of(num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of its memory holds as many blocks, beside a step that takes 1000 bytes and 500 that others hold."""
    total = 2 * (num_blocks * SPEC.block_bytes + 1500)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total - 500, total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1007)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(cuda_model, "import_flashinfer", FakeFlashInfer)
    monkeypatch.setattr(cuda_model, "CudaGraphRecorder", CallingRecorder)


@pytest.mark.parametrize(
    ("role", "kind"),
    [
        (WorkerRole.PREFILL, TransformersModel),
        (WorkerRole.DECODE, GraphedModel),
        (WorkerRole.COLOCATED, GraphedModel),
    ],
)
def test_a_worker_takes_the_blocks_that_fit_but_one_and_records_what_it_decodes(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, role: WorkerRole, kind: type
) -> None:
    gpu_of(21, monkeypatch)
    step_model, storage = run_on_gpu(options_for(role), model, "cpu")
    assert (type(step_model), storage.num_blocks, storage.scratch_block) == (kind, 20, 20)


def test_a_gpu_that_cannot_hold_one_sequence_is_refused(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of(8, monkeypatch)  # a sequence of 32 tokens needs 8, and the scratch block is the ninth
    with pytest.raises(ResourceError, match=r"Too little GPU memory: .*--max-model-len"):
        run_on_gpu(options_for(WorkerRole.COLOCATED), model, "cpu")


@pytest.mark.parametrize(("here", "in_another"), [(21, 13), (13, 21)])
def test_ranks_take_the_blocks_that_fit_in_each_and_decode_without_graphs(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, here: int, in_another: int
) -> None:
    gpu_of(here, monkeypatch)
    others: Any = Others(1.0, 0.0, -in_another * SPEC.block_bytes)
    step_model, storage = run_on_gpu(options_for(WorkerRole.DECODE), model, "cpu", others)
    assert (type(step_model), storage.num_blocks) == (TransformersModel, 12)
    assert len(storage.layers[0]) == 12, "a scratch block is for graphs"
