"""What is refused about devices before the model is looked at or a worker is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from engine import startup
from engine.config import load_config
from kvcache.errors import ConfigError, ResourceError, StartupError
from workers.device import choose_device


def set_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("requested", "num_gpus", "expected"),
    [("auto", 0, "cpu"), ("auto", 1, "cuda"), ("cpu", 1, "cpu"), ("cuda", 1, "cuda")],
)
def test_auto_takes_a_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, requested: str, num_gpus: int, expected: str
) -> None:
    set_gpus(monkeypatch, num_gpus)
    assert choose_device(requested) == expected  # type: ignore[arg-type]


REFUSED: dict[str, tuple[int, dict[str, str], type[Exception], str]] = {
    "no GPU": (0, {"device": "cuda"}, ResourceError, "--device is cuda and there is none: torch"),
    "too few GPUs": (1, {"device": "cuda"}, ResourceError, "2 workers need a GPU each and 1 can be used"),
    "too few GPUs, found by itself": (1, {}, ResourceError, "2 workers need a GPU each and 1 can be used"),
    "int8 on a GPU": (2, {"quantization": "int8"}, ConfigError, "--quantization int8 is for CPUs; add --device cpu"),
    "ranks on GPUs": (
        4,
        {"tensor_parallel_size": "2"},
        ConfigError,
        "--tensor-parallel-size is 2: tensor parallelism is not run on a GPU yet; add --device cpu",
    ),
    "ranks of one pool on GPUs": (
        4,
        {"decode_tensor_parallel_size": "2"},
        ConfigError,
        "--decode-tensor-parallel-size is 2: tensor parallelism is not run on a GPU yet",
    ),
    "GPU memory on a CPU": (0, {"gpu_memory_utilization": "0.5"}, ConfigError, "--gpu-memory-utilization is for GPUs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_devices_cannot_do_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    num_gpus, flags, error, words = REFUSED[case]
    set_gpus(monkeypatch, num_gpus)
    monkeypatch.setattr(startup, "describe_checkpoint", lambda *_, **__: pytest.fail("the model was looked at"))
    with pytest.raises(error, match=re.escape(words)) as caught:
        startup.make_plan(load_config(flags), Path("nowhere"))
    assert isinstance(caught.value, StartupError) and "\n" not in str(caught.value)


def test_two_sizes_of_one_cache_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="both set the size"):
        load_config({"kv_cache_memory_bytes": "1GiB", "gpu_memory_utilization": "0.5"})


@pytest.mark.parametrize("value", ["0", "1.1", "-1", "x"])
def test_a_part_of_the_gpus_memory_is_a_fraction(value: str) -> None:
    with pytest.raises(ConfigError, match=f"--gpu-memory-utilization is '{value}'"):
        load_config({"gpu_memory_utilization": value})
