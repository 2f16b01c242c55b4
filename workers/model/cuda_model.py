"""How a model runs on a GPU: which attention, how much KV, and decode steps as graphs."""

from __future__ import annotations

import logging
import subprocess
from typing import Any

import torch

from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.batching import BatchLimits, ScheduledChunk, StepPlan
from scheduler.request import SamplingParams
from workers.model.attention.choose import find_flashinfer_misfit, import_flashinfer
from workers.model.attention.flashinfer_backend import FlashInferAttention
from workers.model.cuda_graphs import CudaGraphRecorder, GraphedModel
from workers.model.runner import check_expected, compared_logits, find_difference, not_its_own_results
from workers.model.step_model import StepModel
from workers.model.transformers_model import TransformersModel

# FlashInfer compiles its kernels on first use: the compiler may be missing or may refuse the GPU.
COMPILE_ERRORS = (RuntimeError, ValueError, OSError, ImportError, subprocess.SubprocessError)
logger = logging.getLogger(__name__)


def choose_cuda_model(model: Any, spec: KVCacheSpec, max_model_len: int, device: str) -> TransformersModel:
    """With FlashInfer where that gives the model's own results; else portable, and a warning that says why.

    What is tried runs a few steps here, which is also when FlashInfer compiles its kernels.

    Raises:
        ModelError: the model is damaged, or portable attention does not give its own results either.
    """
    expected = compared_logits(model)
    check_expected(model, expected)
    misfit = find_flashinfer_misfit(spec, str(model.dtype).removeprefix("torch."))
    library = import_flashinfer() if misfit is None else None
    if misfit is None and library is None:
        misfit = "flashinfer is not installed; the extra twinpool[gpu] brings it"
    if library is not None:
        fast = TransformersModel(model, device, max_model_len, attention=FlashInferAttention(library, device))
        misfit = _find_fault(model, fast, expected, spec)
        if misfit is None:
            return fast
    portable = TransformersModel(model, device, max_model_len)
    difference = find_difference(model, portable, expected, spec)
    if difference is not None:
        raise not_its_own_results(model, difference)
    logger.warning("Attention on this GPU is portable torch, which is slow: %s.", misfit)
    return portable


def _find_fault(model: Any, fast: TransformersModel, expected: torch.Tensor, spec: KVCacheSpec) -> str | None:
    try:
        difference = find_difference(model, fast, expected, spec)
    except COMPILE_ERRORS as error:
        return f"FlashInfer failed: {' '.join(str(error).split())[:500]}"
    return f"with FlashInfer the logits differ by {difference:.2g} of the largest" if difference is not None else None


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
