"""The nouns of scheduling: who the workers are, what they can do, what was decided.

Everything here is a frozen dataclass with slots: it crosses processes and is compared in tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from kvcache.spec import KVCacheSpec


class Phase(StrEnum):
    """The two halves of serving one request."""

    PREFILL = "prefill"  # bound by arithmetic
    DECODE = "decode"  # bound by memory bandwidth


class WorkerRole(StrEnum):
    """Which phases a worker takes."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"

    def takes(self, phase: Phase) -> bool:
        return self is WorkerRole.COLOCATED or self.value == phase.value


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a device was measured to do, at the dtype the worker computes in."""

    name: str  # for people; no decision reads it
    gemm_gflop_s: float  # large matrix products, 1e9 multiply-adds x 2 per second
    read_gb_s: float  # streaming reads of main memory, 1e9 bytes per second
    memory_bytes: int
    num_threads: int = 1
    price_per_hour: float = 0.0  # 0 means unknown


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself when it registers; constant for the life of one process."""

    worker_id: str  # given by the launcher, e.g. "prefill-0"; a restarted worker keeps it
    incarnation: int  # grows with every restart: late words of an earlier process are ignored
    role: WorkerRole
    address: str  # host:port of its gRPC services
    process_id: int
    device: DeviceProfile
    model: str
    max_model_len: int
    spec: KVCacheSpec
    num_blocks: int
    tensor_parallel_size: int = 1  # ranks; spec, num_blocks and device are those of all together


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker's own count of its work, sent with every heartbeat. Counters grow for the life of the process."""

    running: int = 0
    waiting: int = 0
    blocks_free: int = 0
    blocks_leased: int = 0  # reserved for, or held by, a handoff under way
    blocks_unaccounted: int = 0  # must be 0
    prompt_tokens_computed: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens of sequences that began here
    prefix_cache_hits: int = 0  # those of them whose KV was cached: not computed, or not sent, once more
    transfers: int = 0
    transfer_bytes: int = 0  # KV payload received
    transfer_seconds: float = 0.0
    transfer_failures: tuple[tuple[str, int], ...] = ()  # (fault, count)


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One worker as the scheduler sees it."""

    info: WorkerInfo
    load: WorkerLoad
    requests_in_flight: int  # placed here and not yet finished, as the scheduler counts
    tokens_in_flight: int  # their prompt tokens (prefill) or prompt + max_tokens (decode)
    requests_placed: int  # since it registered: lets equal workers take turns
    last_heard_s: float  # monotonic seconds of the scheduler's clock


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """All live workers: what `twinpool status` shows."""

    workers: tuple[WorkerSnapshot, ...] = ()
    missing: tuple[str, ...] = field(default=())  # ids of workers that were launched and are not registered now


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    worker_id: str
    address: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one request runs. ``prefill`` is None when the decode worker prefills in place."""

    request_id: str
    decode: WorkerAddress
    prefill: WorkerAddress | None
