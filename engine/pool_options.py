"""Options of the workers: how many of each role, on what, and what the pools have of their own."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from engine.cluster_options import ClusterOptions
from engine.option import option
from scheduler.autoscaler import PoolLimits
from scheduler.types import WorkerRole

# Options of which a pool may have its own: prefill_NAME and decode_NAME beside NAME.
POOL_OPTIONS = ("tensor_parallel_size", "block_size", "kv_cache_dtype", "device_profile", "node_label", "resource")


class PoolOptions(ClusterOptions):
    """Part of ``engine.config.ServeConfig``."""

    prefill_workers: int | None = option(None, "Pools", "workers that compute prompts (default: 1)", ge=0, le=256)
    decode_workers: int | None = option(None, "Pools", "workers that generate tokens (default: 1)", ge=0, le=256)
    colocated: int = option(0, "Pools", "workers that do both phases, instead of or beside two pools", ge=0, le=256)
    min_prefill_workers: int | None = option(
        None, "Pools", "autoscaling leaves at least so many (default: --prefill-workers)", ge=1, le=256
    )
    max_prefill_workers: int | None = option(
        None, "Pools", "autoscaling: up to so many, on nodes that Ray is asked for", ge=1, le=256
    )
    min_decode_workers: int | None = option(None, "Pools", "the same for decode workers", ge=1, le=256)
    max_decode_workers: int | None = option(None, "Pools", "the same for decode workers", ge=1, le=256)
    roles: Literal["fixed", "auto"] = option(
        "fixed", "Pools", "auto: workers change between prefill and decode as the load does", "WAY"
    )
    drain_timeout: float | None = option(
        None,
        "Pools",
        "what still decodes on a drained worker after so long goes on at others (default: it ends where it is)",
        "SECONDS",
        ge=0,
        le=86400,
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Pools", "what workers compute on; auto is cuda, a GPU for each, where torch finds one", "DEVICE"
    )
    device_profile: str | None = option(
        None,
        "Pools",
        "what the scheduler takes workers' devices for, instead of measuring them: a file, or a shipped name such as"
        " h100-sxm",
        "PROFILE",
    )
    prefill_device_profile: str | None = option(
        None, "Pools", "the same for prefill workers alone (default: --device-profile)", "PROFILE"
    )
    decode_device_profile: str | None = option(
        None, "Pools", "the same for decode workers alone (default: --device-profile)", "PROFILE"
    )
    threads_per_worker: int | None = option(
        None, "Pools", "CPU threads of each worker, shared out to its ranks (default: cores shared out)", ge=1, le=1024
    )
    tensor_parallel_size: int = option(
        1, "Pools", "processes (ranks) that compute each worker's model together", short="-tp", ge=1, le=256
    )
    prefill_tensor_parallel_size: int | None = option(
        None, "Pools", "the same for prefill workers alone (default: --tensor-parallel-size)", ge=1, le=256
    )
    decode_tensor_parallel_size: int | None = option(
        None, "Pools", "the same for decode workers alone (default: --tensor-parallel-size)", ge=1, le=256
    )

    @model_validator(mode="after")
    def _check_pools(self) -> Self:
        prefill, decode = self.num_prefill_workers, self.num_decode_workers
        if not prefill and not decode and not self.colocated:
            raise ValueError("there are no workers: set prefill_workers and decode_workers, or colocated")
        if bool(prefill) != bool(decode):
            raise ValueError(
                f"prefill_workers is {prefill} and decode_workers {decode}; two pools need at least 1 of each,"
                " and colocated needs neither"
            )
        for name in POOL_OPTIONS:
            if not prefill and any(getattr(self, f"{pool}_{name}") is not None for pool in ("prefill", "decode")):
                raise ValueError(f"there are no two pools whose {name} could differ: colocated has one")
        return self

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        if self.roles == "auto" and not self.num_prefill_workers:
            raise ValueError("roles is auto, and colocated workers have no other role: set prefill_workers too")
        return self

    @model_validator(mode="after")
    def _check_autoscaling(self) -> Self:
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
            low, high = (getattr(self, f"{end}_{role.value}_workers") for end in ("min", "max"))
            count = self.num_workers_of(role)
            if low is not None and high is None:
                raise ValueError(
                    f"min_{role.value}_workers is {low}, and without max_{role.value}_workers nothing scales"
                )
            if high is None:
                continue
            if self.address is None or self.roles == "auto":
                reason = (
                    "roles is auto" if self.address is not None else "this machine has no more nodes: set address too"
                )
                raise ValueError(f"max_{role.value}_workers asks Ray for nodes, and {reason}")
            if low is not None and low > high:
                raise ValueError(f"min_{role.value}_workers is {low} and max_{role.value}_workers {high}")
            if not (low or count) <= count <= high or not count:
                raise ValueError(
                    f"{role.value}_workers is {count}, and autoscaling would keep it from {low or count} to {high}"
                )
        return self

    @model_validator(mode="after")
    def _check_threads(self) -> Self:
        for role in WorkerRole:
            size = self.tensor_parallel_size_of(role)
            if self.num_workers_of(role) and self.threads_per_worker is not None and self.threads_per_worker % size:
                raise ValueError(
                    f"threads_per_worker is {self.threads_per_worker} and a {role.value} worker has {size} ranks:"
                    " each rank must get the same number of threads"
                )
        return self

    @property
    def num_prefill_workers(self) -> int:
        return self._default_pool(self.prefill_workers)

    @property
    def num_decode_workers(self) -> int:
        return self._default_pool(self.decode_workers)

    @property
    def num_workers(self) -> int:
        return sum(self.num_workers_of(role) for role in WorkerRole)

    @property
    def num_ranks(self) -> int:
        """Processes that compute: workers times the size of their groups."""
        return sum(self.num_workers_of(role) * self.tensor_parallel_size_of(role) for role in WorkerRole)

    @property
    def pool_limits(self) -> dict[WorkerRole, PoolLimits]:
        """Of the pools that scale by themselves."""
        limits = {}
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
            high = getattr(self, f"max_{role.value}_workers")
            if high is not None:
                low = getattr(self, f"min_{role.value}_workers") or self.num_workers_of(role)
                limits[role] = PoolLimits(low, high)
        return limits

    def num_workers_of(self, role: WorkerRole) -> int:
        return {
            WorkerRole.PREFILL: self.num_prefill_workers,
            WorkerRole.DECODE: self.num_decode_workers,
            WorkerRole.COLOCATED: self.colocated,
        }[role]

    def tensor_parallel_size_of(self, role: WorkerRole) -> int:
        return int(getattr(self, self.option_of(role, "tensor_parallel_size")))

    def block_size_of(self, role: WorkerRole) -> int:
        return int(getattr(self, self.option_of(role, "block_size")))

    def kv_cache_dtype_of(self, role: WorkerRole) -> str:
        return str(getattr(self, self.option_of(role, "kv_cache_dtype")))

    def node_labels_of(self, role: WorkerRole) -> tuple[tuple[str, str], ...]:
        labels = getattr(self, self.option_of(role, "node_label"))
        return tuple((key, value) for key, _, value in (label.partition("=") for label in labels))

    def resources_of(self, role: WorkerRole) -> tuple[tuple[str, float], ...]:
        """Custom resources of each rank."""
        resources = getattr(self, self.option_of(role, "resource"))
        return tuple((name, float(amount)) for name, _, amount in (each.partition("=") for each in resources))

    def device_profile_of(self, role: WorkerRole) -> str | None:
        profile: str | None = getattr(self, self.option_of(role, "device_profile"))
        return profile

    def option_of(self, role: WorkerRole, name: str) -> str:
        """Which option decides ``name`` (of POOL_OPTIONS) for workers of this role: the pool's own, if it is set."""
        own = f"{role.value}_{name}"
        return own if getattr(self, own, None) is not None else name

    def _default_pool(self, count: int | None) -> int:
        return count if count is not None else int(self.colocated == 0)
