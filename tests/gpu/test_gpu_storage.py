"""KV between GPUs, and between a GPU and a CPU; and what a worker measures of its GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcache.storage import PagedStorage
from scheduler.batching import BatchLimits
from tests.builders import fill_with_noise, make_spec
from tests.tiny_model import make_plan, tiny_llama, tiny_spec
from tests.unit.kvcache.handoff import BYSTANDER, FIRST_TOKEN_ID, REQUEST_ID, Handoff
from workers.model.cuda_model import choose_cuda_model, kv_cache_bytes, largest_step
from workers.model.runner import ModelRunner
from workers.model.transformers_model import TransformersModel, load_model
from workers.probe import ProbedModel, probe_device

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
LONG_KERNEL_CYCLES = 4_000_000_000  # about two seconds


@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_a_handoff_moves_the_blocks_and_no_others(devices: tuple[str, str]) -> None:
    handoff = Handoff(source_device=devices[0], target_device=devices[1])
    received = handoff.deliver()
    assert received.first_token_id == FIRST_TOKEN_ID
    assert handoff.target.read(REQUEST_ID) == handoff.expected
    assert handoff.target.read(BYSTANDER) == handoff.bystander_before
    handoff.end()
    handoff.source.manager.check_idle()
    handoff.target.manager.check_idle()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "fp8"])
def test_a_round_trip_over_both_devices_keeps_every_bit(dtype: str) -> None:
    spec = make_spec(dtype=dtype)
    start, middle, end = PagedStorage(spec, 5), PagedStorage(spec, 5, "cuda"), PagedStorage(spec, 5)
    fill_with_noise(start, 1)
    for layer in range(spec.num_layers):
        middle.write_blocks(layer, [4, 0, 2], start.read_blocks(layer, [1, 2, 3]))
        end.write_blocks(layer, [1, 2, 3], middle.read_blocks(layer, [4, 0, 2]))
        assert torch.equal(end.layers[layer][1:4], start.layers[layer][1:4])
        assert not middle.layers[layer][[1, 3]].any()


def test_copies_do_not_wait_for_a_running_step() -> None:
    storage = PagedStorage(make_spec(), 8, "cuda")
    payload = storage.read_blocks(0, [1, 2])  # takes its memory before the step runs
    storage.write_blocks(0, [3, 4], payload)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG_KERNEL_CYCLES)
    ended = torch.cuda.Event()
    ended.record()
    storage.write_blocks(0, [3, 4], storage.read_blocks(0, [1, 2]))
    assert not ended.query(), "the copies waited for the step"
    storage.synchronize()
    assert ended.query()


def test_a_model_on_the_gpu_gives_the_cpus_logits_in_float32(tmp_path: Path) -> None:
    spec = tiny_spec(64)
    on_gpu = TransformersModel(tiny_llama(tmp_path, spec, "cuda"), "cuda")
    on_cpu = TransformersModel(load_model(tmp_path, "float32"))
    storages = PagedStorage(spec, 8, "cuda"), PagedStorage(spec, 8)
    for chunks in ([(0, 0, 9), (1, 0, 3)], [(0, 9, 10), (1, 3, 7)]):
        plan = make_plan(*chunks, blocks=[[0, 3, 5], [6, 1, 2]])
        found, expected = on_gpu.logits(plan, storages[0]), on_cpu.logits(plan, storages[1])
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-3)


def test_a_gpu_without_flashinfer_for_the_dtype_is_served_and_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = tiny_spec(64)
    chosen = choose_cuda_model(tiny_llama(tmp_path, spec, "cuda"), spec, 256, "cuda")
    (record,) = caplog.records
    assert "not float32" in record.getMessage()
    output = ModelRunner(chosen, PagedStorage(spec, 8, "cuda")).execute(make_plan((0, 0, 9), blocks=[[0, 3, 5]]))
    assert set(output.tokens) == {"0"}


def test_the_memory_that_is_left_for_kv_can_be_taken(tmp_path: Path) -> None:
    spec = tiny_spec(64, "bfloat16")
    model = choose_cuda_model(tiny_llama(tmp_path, spec, "cuda"), spec, 256, "cuda")
    available = kv_cache_bytes(model, spec, largest_step(BatchLimits(16, 256), 256, spec.block_size), 0.5, "cuda")
    _, total = torch.cuda.mem_get_info()
    assert 0 < available < total // 2
    storage = PagedStorage(spec, available // spec.block_bytes, "cuda")
    free, _ = torch.cuda.mem_get_info()
    assert free >= total - total // 2 - (256 << 20)  # the half that was promised, but for pieces of the allocator
    del storage
    torch.cuda.empty_cache()


def test_the_probe_names_the_gpu_and_measures_more_than_a_cpu_has() -> None:
    profile = probe_device(ProbedModel("bfloat16"), "cuda")
    assert profile.name == torch.cuda.get_device_name() and profile.memory_bytes > 1 << 30
    assert profile.gemm_gflop_s > 1000 and profile.read_gb_s > 50
