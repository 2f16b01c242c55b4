"""Measures what this process can do on its device, in about a third of a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from kvcache.storage import TORCH_DTYPES
from scheduler.types import DeviceProfile

_GEMM_SIZE = 1024
_READ_BYTES = 256 << 20  # well beyond the last cache level
_REPEATS = 3


def probe_device(dtype: str = "float32", device: str = "cpu") -> DeviceProfile:
    """Measures the rate of a large matrix product in ``dtype`` and of streaming reads, best of three.

    Best and not mean: what others do on the machine at this moment is not a property of the device.
    """
    left = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(TORCH_DTYPES[dtype])
    right = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(TORCH_DTYPES[dtype])
    gemm_s = _best_seconds(lambda: torch.mm(left, right), device)
    ones = torch.ones(_READ_BYTES // 4, device=device)
    read_s = _best_seconds(ones.sum, device)
    return DeviceProfile(
        name=_device_name(device),
        gemm_gflop_s=2 * _GEMM_SIZE**3 / gemm_s / 1e9,
        read_gb_s=_READ_BYTES / read_s / 1e9,
        memory_bytes=_memory_bytes(device),
        num_threads=torch.get_num_threads(),
    )


def _best_seconds(work: Callable[[], object], device: str) -> float:
    work()  # the first call allocates and chooses kernels
    seconds = []
    for _ in range(_REPEATS):
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return "cpu"


def _memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
