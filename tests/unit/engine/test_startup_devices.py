"""What is refused about devices before the model is looked at or a worker is started."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import startup
from engine.config import load_config
from kvcache.errors import ConfigError, ResourceError, StartupError
from tests.builders import make_options
from workers.device import choose_device, gpu_of_rank


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
    "too few GPUs for the ranks": (
        3,
        {"tensor_parallel_size": "2"},
        ResourceError,
        "2 workers with 4 ranks in all need a GPU each and 3 can be used here",
    ),
    "too few GPUs for the ranks of one pool": (
        2,
        {"decode_tensor_parallel_size": "2"},
        ResourceError,
        "2 workers with 3 ranks in all need a GPU each and 2 can be used here",
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


@pytest.mark.parametrize("flags", [{"tensor_parallel_size": "2"}, {"decode_tensor_parallel_size": "3"}])
def test_with_a_gpu_for_each_rank_the_model_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, str]
) -> None:
    set_gpus(monkeypatch, 4)

    class LookedAtError(Exception):
        pass

    def describe(_path: Path, *, dtype: str, device: str) -> None:
        assert device == "cuda"
        raise LookedAtError

    monkeypatch.setattr(startup, "describe_checkpoint", describe)
    with pytest.raises(LookedAtError):
        startup.make_plan(load_config(flags), Path("nowhere"))


def test_ray_is_asked_whether_it_has_a_gpu_for_each_rank() -> None:
    options = make_options()
    workers = [replace(options, device="cuda", tensor_parallel_size=size) for size in (1, 4)]
    checkpoint: Any = None
    tenants: Any = None
    plan = startup.StartupPlan(checkpoint, 64, (*workers, replace(options, tensor_parallel_size=2)), {}, tenants)
    assert plan.num_gpus == 5


@pytest.mark.parametrize(
    ("num_gpus", "rank", "gpu"), [(1, 0, "cuda:0"), (1, 3, "cuda:0"), (4, 0, "cuda:0"), (4, 3, "cuda:3")]
)
def test_a_rank_takes_the_only_gpu_that_ray_shows_it_or_the_one_of_its_number(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, rank: int, gpu: str
) -> None:
    set_gpus(monkeypatch, num_gpus)
    assert gpu_of_rank(rank) == gpu


def test_a_rank_beyond_the_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 2)
    with pytest.raises(ResourceError, match="Rank 2 of a tensor-parallel group needs a GPU of its own; torch sees 2"):
        gpu_of_rank(2)


def test_two_sizes_of_one_cache_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="both set the size"):
        load_config({"kv_cache_memory_bytes": "1GiB", "gpu_memory_utilization": "0.5"})


@pytest.mark.parametrize("value", ["0", "1.1", "-1", "x"])
def test_a_part_of_the_gpus_memory_is_a_fraction(value: str) -> None:
    with pytest.raises(ConfigError, match=f"--gpu-memory-utilization is '{value}'"):
        load_config({"gpu_memory_utilization": value})
