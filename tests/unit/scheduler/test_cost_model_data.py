"""The cost model beside what others measured on GPUs, and published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.cost_model import CostModel
from scheduler.types import DeviceProfile, ModelShape, StepTimes
from tests.builders import make_worker

# Milliseconds of Llama2-70B on two GPUs: medians of the rows of perf_model.csv of Mutinifni/splitwise-sim (MIT).
PROMPTS = {  # tokens of one prompt
    "A100": {128: 81.1, 256: 112.9, 512: 195.5, 1024: 377.1, 2048: 688.1, 4096: 1485.3},
    "H100": {128: 48.3, 256: 51.8, 512: 83.8, 1024: 158.0, 2048: 310.3, 4096: 642.7},
}
STEPS = {  # sequences of 512 tokens
    "A100": {1: 59.9, 2: 59.9, 4: 60.5, 8: 61.7, 16: 65.5, 32: 72.2},
    "H100": {1: 37.1, 2: 37.4, 4: 40.0, 8: 40.4, 16: 42.0, 32: 52.3},
}
# What the shipped profiles say of two of them, in bfloat16.
PAIRS = {
    "A100": DeviceProfile("2 x A100", 2 * 277_680.0, 2 * 1427.3, 160 << 30, attention_gb_s=2 * 1406.9),
    "H100": DeviceProfile("2 x H100", 2 * 791_200.0, 2 * 2747.0, 160 << 30, attention_gb_s=2 * 2713.5),
}
LAYER_WEIGHTS = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
HEAD_WEIGHTS = 32000 * 8192
LLAMA2_70B = ModelShape(
    80, 2.0 * LAYER_WEIGHTS, 2.0 * HEAD_WEIGHTS, 2.0 * LAYER_WEIGHTS, 2.0 * HEAD_WEIGHTS, 4.0 * 80 * 64 * 128, 327_680
)


def model_of(name: str, device: DeviceProfile, shape: ModelShape) -> CostModel:
    model = CostModel()
    model.add(replace(make_worker(name), device=device, shape=shape, max_num_batched_tokens=1 << 20))
    return model


def taught(name: str) -> CostModel:
    """Has seen every second size, often enough to know it."""
    model = model_of(name, PAIRS[name], LLAMA2_70B)
    for _ in range(20):
        for num_tokens, milliseconds in list(PROMPTS[name].items())[::2]:
            pairs = num_tokens * (num_tokens + 1) // 2
            model.observe(name, StepTimes(1, num_tokens, pairs, 0, 0, milliseconds / 1e3))
        for batch, milliseconds in list(STEPS[name].items())[::2]:
            model.observe(name, StepTimes(1, 0, 0, batch, batch * 512, milliseconds / 1e3))
    return model


@pytest.mark.parametrize("name", ["A100", "H100"])
def test_sizes_that_were_never_seen_are_predicted_from_those_that_were(name: str) -> None:
    model = taught(name)
    for num_tokens, milliseconds in list(PROMPTS[name].items())[1::2]:
        assert model.prefill_seconds(name, num_tokens) == pytest.approx(milliseconds / 1e3, rel=0.15)
    for batch, milliseconds in list(STEPS[name].items())[1::2]:
        assert model.decode_step_seconds(name, batch, 512 * batch) == pytest.approx(milliseconds / 1e3, rel=0.15)


def test_profiles_alone_order_devices_and_phases_rightly() -> None:
    """A slower GPU loses more in prefill than in decode: measured 2.0-2.4 and 1.5 times."""
    a100, h100 = (model_of(name, PAIRS[name], LLAMA2_70B) for name in ("A100", "H100"))
    prefill = a100.prefill_seconds("A100", 2048) / h100.prefill_seconds("H100", 2048)
    decode = a100.decode_step_seconds("A100", 8, 4096) / h100.decode_step_seconds("H100", 8, 4096)
    assert 1.2 < decode < 2.2 < prefill < 3.2


def test_taught_models_say_how_much_slower_a_device_is() -> None:
    a100, h100 = taught("A100"), taught("H100")
    prefill = a100.prefill_seconds("A100", 1024) / h100.prefill_seconds("H100", 1024)
    decode = a100.decode_step_seconds("A100", 8, 4096) / h100.decode_step_seconds("H100", 8, 4096)
    assert 1.8 < prefill < 2.5 and 1.4 < decode < 1.65


def test_an_a100_that_nobody_measured_takes_what_distserve_fitted() -> None:
    """OPT-13B on one A100: 0.102 ms a token of a prompt, and decode of 19.9 ms + 0.00063 ms for each token of context.

    LLMServe/DistServe (Apache-2.0), its own engine. The profile knows nothing of it.
    """
    device = replace(PAIRS["A100"], gemm_gflop_s=277_680.0, read_gb_s=1427.3, attention_gb_s=1406.9)
    layer_weights, head_weights = 40 * 12 * 5120 * 5120, 50272 * 5120
    shape = ModelShape(
        40,
        2.0 * layer_weights,
        2.0 * head_weights,
        2.0 * layer_weights,
        2.0 * head_weights,
        4.0 * 40 * 5120,
        2 * 2 * 40 * 5120,
    )
    model = model_of("A100", device, shape)
    per_token = (model.prefill_seconds("A100", 1200) - model.prefill_seconds("A100", 1000)) / 200
    assert per_token == pytest.approx(0.102e-3, rel=0.15)
    assert model.decode_step_seconds("A100", 1, 0) == pytest.approx(19.9e-3, rel=0.10)
    per_context = (model.decode_step_seconds("A100", 8, 8000) - model.decode_step_seconds("A100", 8, 0)) / 8000
    assert per_context == pytest.approx(0.00063e-3, rel=0.10)
