"""What is refused and worked out before anything starts: ranks, their threads and their blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine import cluster_room, startup
from engine.cluster_room import own_threads
from engine.config import load_config
from kvcache.errors import ConfigError, ResourceError
from scheduler.types import DeviceProfile, WorkerRole
from tests.builders import make_shape, make_spec
from workers.model.checkpoint import CheckpointInfo
from workers.model.shape import LayerWeights

CHECKPOINT = CheckpointInfo(
    path=Path("model"),
    architecture="LlamaForCausalLM",
    model_type="llama",
    num_layers=2,
    num_attention_heads=9,
    num_kv_heads=3,
    head_size=4,
    hidden_size=36,
    vocab_size=100,
    max_position_embeddings=64,
    eos_token_ids=(),
    num_parameters=1000,
    dtype="float32",
    weight_bytes=4000,
    layer_weights=LayerWeights(held=900, used=900),
)


def test_ranks_that_do_not_fit_the_heads_are_refused_by_the_option_that_asked_for_them() -> None:
    startup._check_ranks(load_config({"tensor_parallel_size": "3", "decode_tensor_parallel_size": "9"}), CHECKPOINT)
    with pytest.raises(ConfigError, match="--decode-tensor-parallel-size is 2: 9 attention heads and 3 KV heads"):
        startup._check_ranks(load_config({"decode_tensor_parallel_size": "2"}), CHECKPOINT)
    with pytest.raises(ConfigError, match=r"^--tensor-parallel-size is 6"):
        startup._check_ranks(load_config({"tensor_parallel_size": "6", "colocated": "1"}), CHECKPOINT)


def test_a_model_that_cannot_be_cut_is_refused_with_the_reason() -> None:
    whole = replace(CHECKPOINT, cutting_problem="it is made of one piece")
    startup._check_ranks(load_config({}), whole)
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size is 3: .* it is made of one piece"):
        startup._check_ranks(load_config({"tensor_parallel_size": "3"}), whole)


def test_a_worker_s_threads_are_shared_out_to_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = load_config({"threads_per_worker": "6", "prefill_tensor_parallel_size": "3"})
    assert own_threads(given, WorkerRole.PREFILL) == 2
    assert own_threads(given, WorkerRole.DECODE) == 6
    monkeypatch.setattr(cluster_room, "usable_cores", lambda: 8)
    assert own_threads(load_config({"tensor_parallel_size": "2"}), WorkerRole.DECODE) == 2
    assert own_threads(load_config({"tensor_parallel_size": "16"}), WorkerRole.DECODE) == 1


@pytest.mark.parametrize(("size", "copies"), [(1, 1), (3, 1), (6, 2), (12, 4)])
def test_a_head_that_several_ranks_hold_takes_its_memory_several_times(size: int, copies: int) -> None:
    spec = make_spec(num_kv_heads=3)
    config = load_config({"kv_cache_memory_bytes": str(120 * spec.block_bytes)})
    assert startup._num_blocks(config, spec, 8, size) == 120 // copies


@pytest.mark.parametrize(("quantization", "needed"), [("none", 4000 + 2 * 4 * 3600), ("int4", 5000 + 2 * 4 * 3600)])
def test_a_worker_needs_its_weights_once_and_its_head_thrice(quantization: str, needed: int) -> None:
    assert startup._loading_bytes(load_config({"quantization": quantization}), CHECKPOINT) == needed


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantization_without_a_native_build_is_refused_before_a_worker_starts(
    monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    monkeypatch.setattr(startup, "describe_checkpoint", lambda *_args, **_kwargs: CHECKPOINT)
    monkeypatch.setattr(startup, "load_library", lambda: None)
    config = load_config({"quantization": quantization, "device": "cpu"})
    with pytest.raises(ConfigError, match=f"^--quantization {quantization} needs the native decoder"):
        startup.make_plan(config, Path("model"))


def test_quantization_of_float16_is_refused_before_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    half = replace(CHECKPOINT, dtype="float16")
    monkeypatch.setattr(startup, "describe_checkpoint", lambda *_args, **_kwargs: half)
    config = load_config({"quantization": "int8", "dtype": "float16", "device": "cpu"})
    with pytest.raises(ConfigError, match=r"^--quantization int8 goes with --dtype float32 or bfloat16, not float16"):
        startup.make_plan(config, Path("model"))


def test_quantization_of_a_family_that_is_not_native_is_refused_before_a_worker_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = replace(CHECKPOINT, architecture="MixtralForCausalLM", model_type="mixtral")
    monkeypatch.setattr(startup, "describe_checkpoint", lambda *_args, **_kwargs: experts)
    monkeypatch.setattr(startup, "load_library", lambda: object())
    config = load_config({"quantization": "int8", "device": "cpu"})
    with pytest.raises(ConfigError, match=r"^--quantization int8 .* \(mixtral\) is none: .* experts"):
        startup.make_plan(config, Path("model"))


def test_a_model_that_a_profile_s_device_cannot_hold_is_refused_with_how_much_it_needs() -> None:
    config = load_config({"decode_device_profile": "tiny.yaml", "kv_cache_memory_bytes": "8MiB"})
    shape = replace(make_shape(make_spec()), weight_bytes=3 << 20, head_bytes=1 << 20)
    device = DeviceProfile("tiny", 1.0, 1.0, 12 << 20)
    startup._check_profile(config, WorkerRole.DECODE, device, shape, 8 << 20)
    small = replace(device, memory_bytes=11 << 20)
    words = "--decode-device-profile is tiny, which has 11 MiB of memory; a decode worker needs 12 MiB, 4 MiB of them"
    with pytest.raises(ResourceError, match=words):
        startup._check_profile(config, WorkerRole.DECODE, small, shape, 8 << 20)
