"""Small objects that many tests need, with defaults for what a test does not care about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from kvcache.manager import KVCacheManager
from kvcache.rows import encode_rows
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.batching import BatchLimits
from scheduler.request import SamplingParams
from scheduler.step_plan import ScheduledChunk
from scheduler.types import DeviceProfile, ModelShape, WorkerInfo, WorkerRole
from workers.worker_options import WorkerOptions

BLOCK_SIZE = 4


def make_spec(
    num_layers: int = 2,
    num_kv_heads: int = 2,
    head_size: int = 4,
    block_size: int = BLOCK_SIZE,
    dtype: str = "float32",
) -> KVCacheSpec:
    return KVCacheSpec(num_layers, num_kv_heads, head_size, block_size, dtype)


def make_shape(spec: KVCacheSpec | None = None) -> ModelShape:
    """A model of a million weights in float32, a tenth of them in its head."""
    spec = spec or make_spec()
    return ModelShape(
        num_layers=spec.num_layers,
        weight_bytes=3.6e6,
        head_bytes=0.4e6,
        linear_flops=1.8e6,
        head_flops=0.2e6,
        attention_flops=4.0 * spec.num_layers * spec.num_kv_heads * spec.head_size,
        kv_token_bytes=spec.token_bytes,
    )


def make_manager(num_blocks: int, lease_ttl_s: float = 10.0, *, prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(make_spec(), num_blocks, lease_ttl_s, prefix_caching=prefix_caching)


def make_sampling(max_tokens: int = 8, stop_token_ids: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, stop_token_ids=stop_token_ids)


def fill_with_noise(storage: PagedStorage, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in storage.layers:
        noise = torch.randn((*layer.shape[:-1], storage.spec.head_size), generator=generator)
        layer.copy_(encode_rows(noise, layer.dtype))


def make_worker(
    worker_id: str,
    role: WorkerRole = WorkerRole.COLOCATED,
    *,
    incarnation: int = 1,
    gemm_gflop_s: float = 100.0,
    read_gb_s: float = 10.0,
    model: str = "tiny",
    spec: KVCacheSpec | None = None,
) -> WorkerInfo:
    return WorkerInfo(
        worker_id,
        incarnation,
        role,
        f"{worker_id}.test:1",
        process_id=1,
        device=DeviceProfile("device", gemm_gflop_s, read_gb_s, memory_bytes=1 << 30),
        model=model,
        max_model_len=256,
        spec=spec or make_spec(),
        num_blocks=64,
        shape=make_shape(spec),
    )


def make_scheduled(
    request_id: str,
    token_ids: Sequence[int],
    start: int,
    block_table: Sequence[int],
    sampling: SamplingParams | None = None,
) -> ScheduledChunk:
    """A chunk as the model sees it; how much of it is prompt does not matter there."""
    return ScheduledChunk(request_id, tuple(token_ids), start, len(token_ids), tuple(block_table), sampling)


def repeatable(max_examples: int, step_count: int = 50) -> settings:
    """Hypothesis that draws the same examples on every run and has no deadline: a slow machine is no failure."""
    return settings(
        max_examples=max_examples,
        stateful_step_count=step_count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def check_interleavings(machine: type[RuleBasedStateMachine], max_examples: int) -> None:
    """Runs the machine's rules in many random orders; its invariants and its teardown assert."""
    run_state_machine_as_test(machine, settings=repeatable(max_examples))


def make_options() -> WorkerOptions:
    """Of a decode worker that nobody starts."""
    return WorkerOptions(
        worker_id="decode-0",
        role=WorkerRole.DECODE,
        model_path="/nowhere",
        model_name="tiny",
        spec=KVCacheSpec(1, 1, 16, 16, "float32"),
        shape=make_shape(),
        num_blocks=4,
        max_model_len=64,
        vocab_size=100,
        dtype="float32",
        limits=BatchLimits(1, 16),
    )


class CountedPatience:
    """``kvcache.transfer.port.Patience`` without a timer."""

    def __init__(self) -> None:
        self.is_suspended = False
        self.num_suspended = 0

    def renew(self) -> None:
        self.is_suspended = False

    def suspend(self) -> None:
        self.is_suspended = True
        self.num_suspended += 1
