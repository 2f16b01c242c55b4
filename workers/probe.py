"""Measures what this process can do on its device: in about half a second at a start, in some seconds for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from kvcache.heads import Shard
from kvcache.spec import KVCacheSpec
from kvcache.storage import TORCH_DTYPES
from scheduler.types import DeviceProfile, GemmRate
from workers.model.fused_decoder import FusedDecoder
from workers.model.step_model import StepModel
from workers.probe_steps import measure_steps
from workers.worker_options import WorkerOptions


@dataclass(frozen=True, slots=True)
class ProbeEffort:
    """How much is measured: every time is the best of some."""

    rows: tuple[int, ...]
    repeats: int
    weight_bytes: int  # of the linear layers that are timed


# Of a starting worker: online correction does the rest.
QUICK = ProbeEffort(rows=(1, 16, 256), repeats=2, weight_bytes=24 << 20)
# Of `twinpool probe`.
THOROUGH = ProbeEffort(rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512), repeats=3, weight_bytes=48 << 20)


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """What steps are to be like. Without ``num_heads`` the model does not run natively: products of torch are timed."""

    dtype: str = "float32"
    quantization: str = "none"
    spec: KVCacheSpec | None = None
    num_heads: int | None = None


AS_FLOAT32 = ProbedModel()
WHOLE = Shard()


def probed_model(options: WorkerOptions, step_model: StepModel, shard: Shard = WHOLE) -> ProbedModel:
    """What a worker's steps, or those of one rank, are like."""
    shape, spec = options.shape, options.spec
    num_heads = round(shape.attention_flops / (4 * shape.num_layers * spec.head_size)) // shard.size
    is_native = isinstance(step_model, FusedDecoder)
    return ProbedModel(options.dtype, options.quantization, shard.of_spec(spec), num_heads if is_native else None)


@dataclass(frozen=True, slots=True)
class _Work:
    gemm_size: int
    read_bytes: int  # well beyond the last cache level
    launches: int  # of the same work between two looks at the clock
    more_rows: tuple[int, ...] = ()  # that a product needs to keep it busy


# A GPU does the CPU's work in microseconds, less than it takes to start it and to wait for it.
_CPU_WORK = _Work(gemm_size=1024, read_bytes=256 << 20, launches=1)
_CUDA_WORK = _Work(gemm_size=4096, read_bytes=1 << 30, launches=10, more_rows=(4096,))


def probe_device(model: ProbedModel = AS_FLOAT32, device: str = "cpu", effort: ProbeEffort = QUICK) -> DeviceProfile:
    """Measures rates of linear layers by rows, of streaming reads and of decode attention, best of some.

    Best and not mean: what others do on the machine at this moment is not a property of the device. The rate of its
    links is not measured here: the first handoffs show it for each pair of workers, without a test of every pair.
    """
    work = _CUDA_WORK if _is_cuda(device) else _CPU_WORK
    read = torch.ones(work.read_bytes // 4, device=device)
    read_s = _best_seconds(read.sum, work.launches, device, effort.repeats + 1)
    del read
    read_gb_s = work.read_bytes / read_s / 1e9
    rates, attention_gb_s = _step_rates(model, work, device, effort)
    if _is_cuda(device):
        torch.cuda.empty_cache()  # the steps have no use for pieces of this size
    return DeviceProfile(
        name=_device_name(device),
        gemm_gflop_s=max(rate.gflop_s for rate in rates),
        read_gb_s=read_gb_s,
        memory_bytes=_memory_bytes(device),
        num_threads=torch.get_num_threads(),
        gemm_rates=rates,
        attention_gb_s=min(attention_gb_s, read_gb_s),  # what seems faster came from a cache
    )


def _step_rates(
    model: ProbedModel, work: _Work, device: str, effort: ProbeEffort
) -> tuple[tuple[GemmRate, ...], float]:
    if model.num_heads is None or model.spec is None:
        return _torch_rates(model.dtype, work, device, effort), 0.0
    measured = measure_steps(
        model.spec,
        model.num_heads,
        model.dtype,
        model.quantization,
        torch.get_num_threads(),
        effort.rows,
        effort.repeats,
        effort.weight_bytes,
    )
    return measured.gemm_rates, measured.attention_gb_s


def _torch_rates(dtype: str, work: _Work, device: str, effort: ProbeEffort) -> tuple[GemmRate, ...]:
    """Several matrices in turn, so that none is read from a cache."""
    size = work.gemm_size
    num_matrices = max(1, (64 << 20) // (size * size * 4))
    weights = torch.randn(num_matrices, size, size, device=device).to(TORCH_DTYPES[dtype])
    rates = []
    for rows in (*effort.rows, *work.more_rows):
        inputs = torch.randn(rows, size, device=device).to(TORCH_DTYPES[dtype])
        seconds = _best_seconds(partial(_multiply_all, inputs, weights), work.launches, device, effort.repeats)
        rates.append(GemmRate(rows, 2 * rows * size * size * num_matrices / seconds / 1e9))
    return tuple(rates)


def _multiply_all(inputs: torch.Tensor, weights: torch.Tensor) -> None:
    for weight in weights:
        torch.mm(inputs, weight)


def _best_seconds(work: Callable[[], object], launches: int, device: str, repeats: int) -> float:
    """Seconds of one launch."""
    work()  # the first call allocates and chooses kernels
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(launches):
            work()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / launches


def add_profiles(own: DeviceProfile, others: Sequence[DeviceProfile]) -> DeviceProfile:
    """What several ranks can do at the same time; all measured the same rows."""
    all_of = (own, *others)
    return DeviceProfile(
        name=own.name,
        gemm_gflop_s=sum(each.gemm_gflop_s for each in all_of),
        read_gb_s=sum(each.read_gb_s for each in all_of),
        memory_bytes=own.memory_bytes,
        num_threads=own.num_threads * len(all_of),
        gemm_rates=tuple(
            GemmRate(rates[0].rows, sum(rate.gflop_s for rate in rates))
            for rates in zip(*(each.gemm_rates for each in all_of), strict=True)
        ),
        attention_gb_s=sum(each.attention_gb_s for each in all_of),
    )


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
