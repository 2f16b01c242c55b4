"""What a probe finds, on work so small that its rates mean nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scheduler.types import DeviceProfile, GemmRate
from tests.builders import make_spec
from workers import probe
from workers.native.library import load_library
from workers.parallel.messages import profile_from_wire, profile_to_wire
from workers.probe import ProbedModel, ProbeEffort, add_profiles, probe_device
from workers.probe_steps import _ProbeSteps

EFFORT = ProbeEffort(rows=(1, 4), repeats=1, weight_bytes=1 << 20)
SPEC = make_spec(num_layers=9, num_kv_heads=1, head_size=16, block_size=16)


@pytest.fixture(autouse=True)
def tiny_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_CPU_WORK", probe._Work(gemm_size=256, read_bytes=1 << 20, launches=1))


def test_products_of_torch_are_timed_where_the_model_does_not_run_natively() -> None:
    profile = probe_device(ProbedModel("bfloat16"), effort=EFFORT)
    assert [rate.rows for rate in profile.gemm_rates] == [1, 4]
    assert profile.gemm_gflop_s == max(rate.gflop_s for rate in profile.gemm_rates) > 0
    assert profile.read_gb_s > 0 and profile.attention_gb_s == 0
    assert profile.num_threads == torch.get_num_threads()


@pytest.mark.skipif(load_library() is None, reason="there is no native build for this processor")
@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("float32", "int8")])
def test_steps_are_timed_where_the_model_runs_natively(dtype: str, quantization: str) -> None:
    profile = probe_device(ProbedModel(dtype, quantization, replace(SPEC, dtype=dtype), 2), effort=EFFORT)
    assert all(rate.gflop_s > 0 for rate in profile.gemm_rates)
    assert 0 < profile.attention_gb_s <= profile.read_gb_s


@pytest.mark.skipif(load_library() is None, reason="there is no native build for this processor")
def test_timed_steps_have_the_weights_and_contexts_that_are_counted() -> None:
    steps = _ProbeSteps(SPEC, 2, "float32", "float32", 1, most_rows=4, weight_bytes=1 << 20)
    assert len(steps.prompt(4).chunks) == 1 and len(steps.prompt(4).chunks[0].token_ids) == 4
    plan = steps.decode(2048)
    assert [chunk.end for chunk in plan.chunks] == [2048] * steps.num_sequences
    blocks = [block for chunk in plan.chunks for block in chunk.block_table]
    assert len(blocks) == len(set(blocks)) == steps.num_sequences * 2048 // SPEC.block_size


def test_ranks_add_up_and_their_rates_survive_the_wire() -> None:
    own = DeviceProfile(
        "cpu", 10.0, 4.0, 1 << 30, 2, gemm_rates=(GemmRate(1, 1.0), GemmRate(8, 10.0)), attention_gb_s=3.0
    )
    other = replace(own, gemm_gflop_s=6.0, gemm_rates=(GemmRate(1, 0.5), GemmRate(8, 6.0)))
    assert profile_from_wire(own, profile_to_wire(other)) == other
    both = add_profiles(own, [other])
    assert (both.gemm_gflop_s, both.read_gb_s, both.attention_gb_s, both.num_threads) == (16.0, 8.0, 6.0, 4)
    assert both.gemm_rates == (GemmRate(1, 1.5), GemmRate(8, 16.0))
