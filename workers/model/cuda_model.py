"""How a model runs on a GPU: which attention, how much KV, and decode steps as graphs."""

from __future__ import annotations

import logging
import math
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvcache.errors import ResourceError
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.batching import BatchLimits
from scheduler.request import SamplingParams
from scheduler.step_plan import ScheduledChunk, StepPlan
from scheduler.types import Phase
from workers.model.attention.choose import find_flashinfer_misfit, import_flashinfer
from workers.model.attention.flashinfer_backend import FlashInferAttention
from workers.model.comparison import compared_logits, differs_by, find_difference
from workers.model.cuda_graphs import CudaGraphRecorder, GraphedModel
from workers.model.runner import check_expected, not_its_own_results
from workers.model.step_model import StepModel
from workers.model.transformers_model import TransformersModel, load_model
from workers.parallel.rank import Rank
from workers.worker_options import WorkerOptions

# FlashInfer compiles its kernels on first use: the compiler may be missing or may refuse the GPU.
COMPILE_ERRORS = (RuntimeError, ValueError, OSError, ImportError, subprocess.SubprocessError)
logger = logging.getLogger(__name__)


def load_on_gpu(
    options: WorkerOptions, rank: Rank | None = None, report: Callable[[float], None] = lambda _part: None
) -> tuple[StepModel, PagedStorage]:
    """The model of a worker, or of one rank of it, on its GPU, and its KV cache there.

    All ranks call this at the same time. ``report`` hears how far that is, from 0 to 1.

    Raises:
        ModelError: the checkpoint cannot be loaded or cut, or does not give its own results here.
        ResourceError: not enough memory for the KV cache.
    """
    device = options.device if rank is None else rank.device
    model = load_model(Path(options.model_path), options.dtype, device, rank=rank, report=report)
    return run_on_gpu(options, model, device, rank)


def run_on_gpu(
    options: WorkerOptions, model: Any, device: str, rank: Rank | None = None
) -> tuple[StepModel, PagedStorage]:
    """The best way to run a loaded model on its GPU, and a KV cache that may get what memory is left.

    With a ``rank``, ``model`` is its share, and all ranks take as many blocks. They decode without graphs: whether
    NCCL's sums are recorded and replayed rightly could not be tried.

    Raises:
        ModelError: the model does not give its own results here.
        ResourceError: not enough memory for the KV cache.
    """
    spec = options.spec if rank is None else rank.shard.of_spec(options.spec)
    step_model = choose_cuda_model(model, spec, options.max_model_len, device, rank)
    num_blocks = options.num_blocks
    if num_blocks is None:
        num_blocks = _fitting_blocks(options, step_model, spec, device, rank)
    try:
        storage = PagedStorage(spec, num_blocks, device, with_scratch_block=rank is None)
    except RuntimeError as error:  # torch's allocator
        raise ResourceError(f"No memory for {num_blocks} KV blocks: {error}") from error
    if rank is not None or not (options.role.takes(Phase.DECODE) or options.changes_role):
        return step_model, storage
    return record_decode(step_model, storage, options.limits, options.max_model_len), storage


def _fitting_blocks(
    options: WorkerOptions, step_model: StepModel, spec: KVCacheSpec, device: str, rank: Rank | None
) -> int:
    """Of several ranks as many as fit in each."""
    largest_plan = largest_step(options.limits, options.max_model_len, spec.block_size)
    available = kv_cache_bytes(step_model, spec, largest_plan, options.gpu_memory_utilization, device)
    if rank is not None:
        available = int(-rank.largest(-available))
    num_blocks = available // spec.block_bytes - 1  # the scratch block
    needed = spec.num_blocks_for(options.max_model_len)
    if num_blocks < needed:
        raise ResourceError(
            f"Too little GPU memory: {available >> 20} MiB are left for the KV cache, and one sequence of"
            f" {options.max_model_len} tokens needs {needed * spec.block_bytes >> 20} MiB;"
            " lower --max-model-len or raise --gpu-memory-utilization."
        )
    return num_blocks


def choose_cuda_model(
    model: Any, spec: KVCacheSpec, max_model_len: int, device: str, rank: Rank | None = None
) -> TransformersModel:
    """With FlashInfer where that gives the model's own results; else portable, and a warning that says why.

    What is tried runs a few steps here, which is also when FlashInfer compiles its kernels. With a ``rank``, ``model``
    and ``spec`` are cut to its share; all ranks choose the same.

    Raises:
        ModelError: the model is damaged, or portable attention does not give its own results either.
    """
    run = partial(TransformersModel, model, device, max_model_len, is_cut=rank is not None)
    expected = compared_logits(model)
    check_expected(model, expected, rank)
    misfit = find_flashinfer_misfit(spec, str(model.dtype).removeprefix("torch."))
    library = import_flashinfer() if misfit is None else None
    if misfit is None and library is None:
        misfit = "flashinfer is not installed; the extra twinpool[gpu] brings it"
    if library is not None:
        fast = run(attention=FlashInferAttention(library, device))
        misfit = _find_fault(model, fast, expected, spec, rank)
        if misfit is None:
            return fast
    portable = run()
    difference = find_difference(model, portable, expected, spec, rank)
    if difference is not None:
        raise not_its_own_results(model, difference)
    logger.warning("Attention on this GPU is portable torch, which is slow: %s.", misfit)
    return portable


def _find_fault(
    model: Any, fast: TransformersModel, expected: torch.Tensor, spec: KVCacheSpec, rank: Rank | None
) -> str | None:
    try:
        difference = find_difference(model, fast, expected, spec, rank)
    except COMPILE_ERRORS as error:
        if rank is not None:
            rank.largest(math.inf)  # what the others hear at the comparison's end; one that is amid its sums is lost
        return f"FlashInfer failed: {' '.join(str(error).split())[:500]}"
    return f"with FlashInfer {differs_by(difference)}" if difference is not None else None


def record_decode(
    model: TransformersModel, storage: PagedStorage, limits: BatchLimits, max_model_len: int
) -> StepModel:
    """The same model with its decode steps as CUDA graphs, where its attention and its code allow that."""
    if not isinstance(model.attention, FlashInferAttention):
        return model
    try:
        return GraphedModel(model, model.attention, storage, limits.max_num_seqs, max_model_len, CudaGraphRecorder())
    except RuntimeError as error:  # the model's own code waits for the device, as routing to experts may
        logger.warning("Decode steps run without CUDA graphs: %s.", " ".join(str(error).split())[:500])
        return model


def kv_cache_bytes(model: StepModel, spec: KVCacheSpec, largest_plan: StepPlan, utilization: float, device: str) -> int:
    """What of ``utilization`` of the GPU's memory is left for KV beside the loaded model and its largest step.

    CUDA graphs are recorded later, in what ``utilization`` leaves of the GPU.
    """
    step_bytes = _peak_bytes(model, spec, largest_plan, device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return budget_bytes(total, total - free, step_bytes, utilization)


def budget_bytes(total_bytes: int, used_bytes: int, step_bytes: int, utilization: float) -> int:
    """``used_bytes`` counts everybody's memory on the GPU: what others hold is not there for KV."""
    return max(0, int(total_bytes * utilization) - used_bytes - step_bytes)


def largest_step(limits: BatchLimits, max_model_len: int, block_size: int) -> StepPlan:
    """As many tokens as a step may have, of as many sequences as may sample in it."""
    num_sequences = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    length = min(limits.max_num_batched_tokens // num_sequences, max_model_len)
    blocks_each = -(-length // block_size)
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    return StepPlan(
        tuple(
            ScheduledChunk(
                str(index),
                (0,) * length,
                0,
                length,
                tuple(range(index * blocks_each, (index + 1) * blocks_each)),
                greedy,
            )
            for index in range(num_sequences)
        )
    )


def _peak_bytes(model: StepModel, spec: KVCacheSpec, plan: StepPlan, device: str) -> int:
    """What a step takes beside the memory that was taken before it."""
    storage = PagedStorage(spec, sum(len(chunk.block_table) for chunk in plan.chunks), device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.logits(plan, storage)
    storage.synchronize()
    return torch.cuda.max_memory_allocated() - before
