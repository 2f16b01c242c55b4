"""Measures what this process can do on its device, in about a third of a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from kvcache.storage import TORCH_DTYPES
from scheduler.types import DeviceProfile

_REPEATS = 3


@dataclass(frozen=True, slots=True)
class _Work:
    gemm_size: int
    read_bytes: int  # well beyond the last cache level
    launches: int  # of the same work between two looks at the clock


# A GPU does the CPU's work in microseconds, less than it takes to start it and to wait for it.
_CPU_WORK = _Work(gemm_size=1024, read_bytes=256 << 20, launches=1)
_CUDA_WORK = _Work(gemm_size=4096, read_bytes=1 << 30, launches=10)


def probe_device(dtype: str = "float32", device: str = "cpu") -> DeviceProfile:
    """Measures the rate of a large matrix product in ``dtype`` and of streaming reads, best of three.

    Best and not mean: what others do on the machine at this moment is not a property of the device.
    """
    work = _CUDA_WORK if _is_cuda(device) else _CPU_WORK
    gemm_s = _gemm_seconds(work, dtype, device)
    read_s = _best_seconds(torch.ones(work.read_bytes // 4, device=device).sum, work.launches, device)
    if _is_cuda(device):
        torch.cuda.empty_cache()  # the steps have no use for pieces of this size
    return DeviceProfile(
        name=_device_name(device),
        gemm_gflop_s=2 * work.gemm_size**3 / gemm_s / 1e9,
        read_gb_s=work.read_bytes / read_s / 1e9,
        memory_bytes=_memory_bytes(device),
        num_threads=torch.get_num_threads(),
    )


def _gemm_seconds(work: _Work, dtype: str, device: str) -> float:
    left, right = (torch.randn(work.gemm_size, work.gemm_size, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
    return _best_seconds(lambda: torch.mm(left, right), work.launches, device)


def _best_seconds(work: Callable[[], object], launches: int, device: str) -> float:
    """Seconds of one launch."""
    work()  # the first call allocates and chooses kernels
    seconds = []
    for _ in range(_REPEATS):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(launches):
            work()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / launches


def _is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def _synchronize(device: str) -> None:
    if _is_cuda(device):
        torch.cuda.synchronize(device)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if _is_cuda(device) else "cpu"


def _memory_bytes(device: str) -> int:
    if _is_cuda(device):
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
