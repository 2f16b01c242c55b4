"""A probe takes at most 10 s: by a clock that only planned steps and reads move, without building the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

from scheduler.step_plan import StepPlan
from tests.builders import make_spec
from workers import probe, probe_steps
from workers.model.shape import WEIGHT_BYTES
from workers.probe import QUICK, THOROUGH, ProbedModel, ProbeEffort, probe_device

MOST_S = 10.0
QUICK_MOST_S = 2.0  # a worker waits for it before it serves
# Below half of one core of the machine that benchmarks/results/engine_*_1thread.json were measured on.
GFLOP_S, QUANTIZED_GFLOP_S, READ_GB_S = 40.0, 80.0, 10.0
SPEC = make_spec(num_layers=30, num_kv_heads=3, head_size=64, block_size=16)
NOWHERE = "meta"  # tensors without memory
NATIVE = [("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("float32", "int4")]


@dataclass(slots=True)
class SlowDevice:
    """Work takes what its products and its bytes take here, one after the other; nothing is computed."""

    gflop_s: float
    now_s: float = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def work(self, flops: float, num_bytes: float) -> None:
        self.now_s += flops / (self.gflop_s * 1e9) + num_bytes / (READ_GB_S * 1e9)

    def best_seconds(self, work: Callable[[], object], launches: int, _device: str, repeats: int) -> float:
        """Stands for ``probe._best_seconds``: a sum over a tensor, or products of torch. It warms up once."""
        before_s = self.now_s
        if isinstance(work, partial):
            inputs, weights = work.args
            self.work(2.0 * len(inputs) * weights.numel(), weights.nbytes)
        else:
            self.work(0.0, work.__self__.nbytes)  # type: ignore[attr-defined]
        once_s = self.now_s - before_s
        self.now_s += once_s * launches * repeats
        return once_s


class CountedSteps(probe_steps._ProbeSteps):
    """Steps that cost their weights, their products and the KV they attend to."""

    device: SlowDevice
    weight_format: str

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._decoder = self  # type: ignore[assignment]

    def logits_of_rows(self, plan: StepPlan, _storage: Any, _rows: list[int]) -> None:
        tokens = sum(len(chunk.token_ids) for chunk in plan.chunks)
        weight_bytes = self.row_flops / 2 * WEIGHT_BYTES[self.weight_format]
        kv_bytes = sum(chunk.end for chunk in plan.chunks) * self.spec.token_bytes
        self.device.work(tokens * self.row_flops, weight_bytes + kv_bytes)


def slow_device(monkeypatch: pytest.MonkeyPatch, dtype: str, quantization: str) -> SlowDevice:
    device = SlowDevice(GFLOP_S if quantization == "none" else QUANTIZED_GFLOP_S)
    CountedSteps.device = device
    CountedSteps.weight_format = dtype if quantization == "none" else quantization
    monkeypatch.setattr(probe_steps, "_ProbeSteps", CountedSteps)
    monkeypatch.setattr(probe_steps, "FusedDecoder", lambda *_, **__: None)
    monkeypatch.setattr(probe_steps, "_made_up_model", lambda *_: None)
    monkeypatch.setattr(probe_steps, "time", device)
    monkeypatch.setattr(probe, "_best_seconds", device.best_seconds)
    return device


@pytest.mark.parametrize(("effort", "most_s"), [(THOROUGH, MOST_S), (QUICK, QUICK_MOST_S)], ids=["thorough", "quick"])
@pytest.mark.parametrize(("dtype", "quantization"), NATIVE)
def test_planned_steps_fit_the_time(
    monkeypatch: pytest.MonkeyPatch, dtype: str, quantization: str, effort: ProbeEffort, most_s: float
) -> None:
    device = slow_device(monkeypatch, dtype, quantization)
    model = ProbedModel(dtype, quantization, replace(SPEC, dtype=dtype), 9)
    profile = probe_device(model, NOWHERE, effort)
    assert 0 < device.now_s <= most_s
    assert [rate.rows for rate in profile.gemm_rates] == list(effort.rows)


def test_planned_products_of_torch_fit_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device = slow_device(monkeypatch, "float32", "none")
    probe_device(ProbedModel("float32"), NOWHERE, THOROUGH)
    assert 0 < device.now_s <= MOST_S
