"""The shipped profiles beside measured kernels of three models on six GPUs; the table in docs/cost_model.md."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from engine.device_profiles import load_profile
from scheduler.cost_model import decode_times, pair_seconds, prefill_times
from scheduler.types import ModelShape, Phase

TIMES = Path(__file__).with_name("gpu_kernel_times.csv")  # says where they are from
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "cost_model.md"
GPUS = ("a100-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "l40s", "rtx-pro-6000")


def dense(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head: int, vocab: int) -> ModelShape:
    """In bfloat16."""
    weights = layers * hidden * (2 * heads * head + 2 * kv_heads * head + 3 * intermediate)
    head_weights = hidden * vocab
    return ModelShape(
        layers, 2.0 * weights, 2.0 * head_weights, 2.0 * weights, 2.0 * head_weights,
        4.0 * layers * heads * head, 2 * 2 * layers * kv_heads * head,
    )  # fmt: skip


MODELS = {
    "Llama-3.2-1B": dense(16, 2048, 8192, 32, 8, 64, 128_256),
    "Llama-3.2-3B": dense(28, 3072, 8192, 24, 8, 128, 128_256),
    "Qwen3-8B": dense(36, 4096, 12_288, 32, 8, 128, 151_936),
}


@dataclass(frozen=True)
class Measured:
    gpu: str
    model: str
    phase: Phase
    size: int
    context_tokens: int
    seconds: float

    def predicted_s(self) -> float:
        """Kernels alone: what an engine adds to a step is a coefficient of its own."""
        device, shape = load_profile(self.gpu), MODELS[self.model]
        if self.phase is Phase.PREFILL:
            pairs = self.size * (self.size + 1) / 2
            return prefill_times(device, shape).seconds(self.size) + pairs * pair_seconds(device, shape)
        kv_bytes = self.size * self.context_tokens * shape.kv_token_bytes
        return decode_times(device, shape).seconds(self.size) + kv_bytes / (device.attention_gb_s * 1e9)

    def error(self) -> float:
        return abs(self.predicted_s() - self.seconds) / self.seconds


def measured() -> Iterator[Measured]:
    with TIMES.open(encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            seconds = float(row["ms"]) / 1e3
            size, context = int(row["size"]), int(row["context_tokens"])
            yield Measured(row["gpu"], row["model"], Phase(row["phase"]), size, context, seconds)


@cache
def errors(gpu: str, phase: Phase) -> tuple[float, ...]:
    return tuple(sorted(each.error() for each in measured() if (each.gpu, each.phase) == (gpu, phase)))


def ninth_of_ten(gpu: str, phase: Phase) -> float:
    found = errors(gpu, phase)
    return found[int(0.9 * len(found))]


@pytest.mark.parametrize("gpu", GPUS)
def test_kernels_take_about_as_long_as_the_profile_of_their_gpu_says(gpu: str) -> None:
    assert len(errors(gpu, Phase.PREFILL)) >= 16 and len(errors(gpu, Phase.DECODE)) >= 20
    assert median(errors(gpu, Phase.PREFILL)) <= 0.12 and median(errors(gpu, Phase.DECODE)) <= 0.08
    assert max(ninth_of_ten(gpu, phase) for phase in Phase) <= 0.20


def test_the_document_says_how_far_off_the_profiles_are() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for gpu in GPUS:
        numbers = [
            f"{100 * part:.0f} / {100 * ninth_of_ten(gpu, phase):.0f} %"
            for phase in Phase
            for part in (median(errors(gpu, phase)),)
        ]
        row = f"| {gpu} | {' | '.join(numbers)} |"
        assert any(line.startswith(row.removesuffix(" |")) for line in text.splitlines()), row
