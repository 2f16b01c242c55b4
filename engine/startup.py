"""Everything that can be known to be wrong before a worker is started."""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from engine.cluster_room import check_room, device_of_cluster, own_room, own_threads, rooms_in_cluster
from engine.config import ServeConfig, flag_of
from engine.device_profiles import load_profile
from engine.machine_limits import available_memory_bytes
from engine.tenants import Tenants, check_fits, load_tenants
from kvcache.errors import ConfigError, ResourceError
from kvcache.heads import Shard, check_size
from kvcache.spec import DTYPE_BYTES, KVCacheSpec
from kvcache.transfer.port_choice import check_port
from kvcache.transfer.wire import MAX_BLOCK_BYTES
from scheduler.room import Node
from scheduler.types import DeviceProfile, ModelShape, Phase, WorkerRole
from workers.device import Device, choose_device, count_gpus
from workers.model.checkpoint import CheckpointInfo, describe_checkpoint
from workers.model.native_families import NOT_NATIVE
from workers.model.shape import model_shape
from workers.native.library import load_library
from workers.tls import TlsFolder
from workers.worker_options import NODE_ADDRESS, WorkerOptions

LOOPBACK = "127.0.0.1"
PACKAGES = ("kvcache", "scheduler", "workers", "engine")
CPU_KV_CACHE_BYTES = 1 << 30
GPU_MEMORY_UTILIZATION = 0.9
PROCESS_BYTES = 500 << 20  # what each rank of a worker needs beside weights and KV: interpreter, torch, activations


@dataclass(frozen=True, slots=True)
class StartupPlan:
    """What will be started."""

    checkpoint: CheckpointInfo
    max_model_len: int
    workers: tuple[WorkerOptions, ...]
    worker_bytes: Mapping[WorkerRole, int]  # memory of this machine that one more worker takes; empty: Ray books it
    tenants: Tenants
    gateway_tls: TlsFolder | None = None

    @property
    def num_gpus(self) -> int:
        """GPUs that the workers take: one for each of their ranks."""
        return sum(options.tensor_parallel_size for options in self.workers if options.device == "cuda")


def check_installation() -> None:
    """Our packages have plain names; another distribution's package of the same name would be run instead.

    Raises:
        ResourceError: names the clash.
    """
    own_root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        found = util.find_spec(name)
        origin = Path(found.origin).resolve() if found is not None and found.origin else None
        if origin is None or origin.parent.parent != own_root:
            raise ResourceError(f"The package {name!r} of Twinpool is hidden by another one at {origin}.")


def prepare_ray(*, joins: bool) -> None:
    """Keeps a cluster of our own to this machine and to itself: loopback, and a token that only its processes have.

    A cluster that is joined has a token of its own, which Ray reads from RAY_AUTH_TOKEN or its file. Call before ray is
    imported: it reads these variables then.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if joins:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a peer that ends is our news to tell, not the library's
    # Despite its name this is what makes Ray take the loopback address for its own on Linux as well.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def bind_server_socket(host: str, port: int) -> socket.socket:
    """Takes the port now, so that nobody else can between this check and the server's start.

    Raises:
        ResourceError: the port is in use, or the host is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        server.listen(2048)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(f"Port {port} on {host} is in use; choose another with --port.") from None
        raise ResourceError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from None
    return server


def make_plan(config: ServeConfig, path: Path, nodes: Sequence[Node] | None = None) -> StartupPlan:
    """Reads the shape of the checkpoint in ``path``, and works out what each worker gets. Imports transformers.

    Args:
        nodes: of the cluster that was joined; None for a cluster of our own on this machine.

    Raises:
        ModelError: the checkpoint is damaged or cannot run.
        ConfigError, ResourceError: the options do not fit the model, the machine or the cluster.
    """
    num_gpus = count_gpus() if nodes is None else sum(int(node.resources.get("GPU", 0)) for node in nodes)
    device = choose_device(config.device) if nodes is None else device_of_cluster(config, num_gpus)
    _check_device(config, device, num_gpus)
    check_port(config.kv_transfer_port)
    checkpoint = describe_checkpoint(path, dtype=config.dtype, device=device)
    max_model_len = _max_model_len(config, checkpoint)
    tenants = load_tenants(config.tenants, (*config.api_key, *filter(None, (config.admin_key,))))
    check_fits(tenants, config.tenants, max_model_len)
    _check_quantization(config, checkpoint)
    specs = {role: _spec(config, checkpoint, role) for _, role in _roles(config)}
    profiles = {role: _device_profile(config, role) for _, role in _roles(config)}
    _check_ranks(config, checkpoint)
    _check_tiers(config, specs)
    worker_bytes = _worker_bytes(config, checkpoint, device)
    if nodes is None:
        _check_memory(config, checkpoint, device, worker_bytes)
        rooms = {role: own_room(config, role, device) for role in specs}
        threads = {role: own_threads(config, role) for role in specs}
    else:
        rooms = rooms_in_cluster(config, device, nodes, worker_bytes)
        check_room(config, nodes, rooms)
        threads = {role: int(dict(room.resources)["CPU"]) for role, room in rooms.items()}
    is_left_to_gpu = device == "cuda" and config.kv_cache_memory_bytes is None
    shapes = {role: model_shape(checkpoint, spec, config.quantization) for role, spec in specs.items()}
    for role, profile in profiles.items():
        # Of a GPU's memory what is left is for KV, and must hold one sequence.
        one_bytes = specs[role].num_blocks_for(max_model_len) * specs[role].block_bytes
        if profile is not None:
            _check_profile(
                config, role, profile, shapes[role], one_bytes if is_left_to_gpu else _kv_cache_bytes(config)
            )
    workers = tuple(
        WorkerOptions(
            worker_id=worker_id,
            role=role,
            model_path=str(path),
            model_name=config.served_name,
            spec=specs[role],
            shape=shapes[role],
            num_blocks=None
            if is_left_to_gpu
            else _num_blocks(config, specs[role], max_model_len, config.tensor_parallel_size_of(role)),
            max_model_len=max_model_len,
            vocab_size=checkpoint.vocab_size,
            dtype=checkpoint.dtype,
            limits=config.batch_limits,
            num_threads=threads[role],
            tensor_parallel_size=config.tensor_parallel_size_of(role),
            device=device,
            device_profile=profiles[role],
            gpu_memory_utilization=config.gpu_memory_utilization or GPU_MEMORY_UTILIZATION,
            quantization=config.quantization,
            prefix_caching=config.enable_prefix_caching,
            kv_transfer_dtype=config.kv_transfer_dtype,
            kv_host_cache_bytes=int(config.kv_host_cache_bytes),
            kv_file_cache_dir=str(Path(config.kv_file_cache_dir).absolute()) if config.kv_file_cache_dir else "",
            kv_file_cache_bytes=int(config.kv_file_cache_bytes or 0),
            kv_offer_rate=int(config.kv_offer_rate),
            kv_transfer_port=config.kv_transfer_port,
            log_level=config.log_level,
            host=config.worker_host or (LOOPBACK if nodes is None else NODE_ADDRESS),
            model_source=config.model,
            room=rooms[role],
            changes_role=config.roles == "auto",
        )
        for worker_id, role in _roles(config)
    )
    return StartupPlan(checkpoint, max_model_len, workers, worker_bytes if nodes is None else {}, tenants)


def _spec(config: ServeConfig, checkpoint: CheckpointInfo, role: WorkerRole) -> KVCacheSpec:
    """Pools may differ in block size and dtype: the handoff converts."""
    dtype = config.kv_cache_dtype_of(role)
    spec = KVCacheSpec(
        checkpoint.num_layers,
        checkpoint.num_kv_heads,
        checkpoint.head_size,
        config.block_size_of(role),
        checkpoint.dtype if dtype == "auto" else dtype,
    )
    if spec.layer_block_bytes > MAX_BLOCK_BYTES:
        raise ConfigError(
            f"{flag_of(config.option_of(role, 'block_size'))} is {spec.block_size}: one block of one layer would have"
            f" {_mebibytes(spec.layer_block_bytes)}; a message of the handoff holds {_mebibytes(MAX_BLOCK_BYTES)}."
        )
    return spec


def _device_profile(config: ServeConfig, role: WorkerRole) -> DeviceProfile | None:
    given = config.device_profile_of(role)
    return load_profile(given, flag_of(config.option_of(role, "device_profile"))) if given is not None else None


def _check_profile(
    config: ServeConfig, role: WorkerRole, profile: DeviceProfile, shape: ModelShape, kv_bytes: int
) -> None:
    """A device that workers are taken for must be able to hold what they hold."""
    weight_bytes = round(shape.weight_bytes + shape.head_bytes)
    if weight_bytes + kv_bytes > profile.memory_bytes:
        raise ResourceError(
            f"{flag_of(config.option_of(role, 'device_profile'))} is {profile.name}, which has"
            f" {_mebibytes(profile.memory_bytes)} of memory; a {role.value} worker needs"
            f" {_mebibytes(weight_bytes + kv_bytes)}, {_mebibytes(weight_bytes)} of them for weights."
        )


def _roles(config: ServeConfig) -> list[tuple[str, WorkerRole]]:
    return [(f"{role.value}-{index}", role) for role in WorkerRole for index in range(config.num_workers_of(role))]


def _check_device(config: ServeConfig, device: Device, num_gpus: int) -> None:
    if device == "cpu":
        if config.gpu_memory_utilization is not None:
            raise ConfigError("--gpu-memory-utilization is for GPUs, and the workers will compute on the CPU.")
        return
    if config.quantization != "none":
        raise ConfigError(f"--quantization {config.quantization} is for CPUs; add --device cpu or leave it out.")
    if config.num_ranks > num_gpus:
        who = f"{config.num_workers} workers"
        if config.num_ranks > config.num_workers:
            who += f" with {config.num_ranks} ranks in all"
        raise ResourceError(
            f"{who} need a GPU each and {num_gpus} can be used here; start fewer"
            " (--colocated 1 does both phases on one), or add --device cpu."
        )


def _check_quantization(config: ServeConfig, checkpoint: CheckpointInfo) -> None:
    if config.quantization == "none":
        return
    if load_library() is None:
        raise ConfigError(f"--quantization {config.quantization} needs the native decoder, which was not built here.")
    if reason := NOT_NATIVE.get(checkpoint.model_type):
        raise ConfigError(
            f"--quantization {config.quantization} needs a model that the native decoder runs; this one"
            f" ({checkpoint.model_type}) is none: {reason}."
        )
    if checkpoint.dtype == "float16":
        raise ConfigError(f"--quantization {config.quantization} goes with --dtype float32 or bfloat16, not float16.")


def _check_ranks(config: ServeConfig, checkpoint: CheckpointInfo) -> None:
    for role in WorkerRole:
        size = config.tensor_parallel_size_of(role)
        if size == 1 or not config.num_workers_of(role):
            continue
        option = flag_of(config.option_of(role, "tensor_parallel_size"))
        if checkpoint.cutting_problem is not None:
            raise ConfigError(f"{option} is {size}: this model cannot be cut, {checkpoint.cutting_problem}.")
        check_size(option, size, checkpoint.num_attention_heads, checkpoint.num_kv_heads)


def _check_tiers(config: ServeConfig, specs: Mapping[WorkerRole, KVCacheSpec]) -> None:
    largest = max(spec.block_bytes for spec in specs.values())
    for name in ("kv_host_cache_bytes", "kv_file_cache_bytes"):
        given = int(getattr(config, name) or 0)
        if 0 < given < 2 * largest:
            raise ConfigError(
                f"{flag_of(name)} is {given}: it does not hold two blocks, which have {largest} bytes each."
            )


def _max_model_len(config: ServeConfig, checkpoint: CheckpointInfo) -> int:
    longest = checkpoint.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}; {config.model} is served with at most {longest}."
        )
    return config.max_model_len or longest


def _num_blocks(config: ServeConfig, spec: KVCacheSpec, max_model_len: int, tensor_parallel_size: int) -> int:
    kv_cache_bytes = _kv_cache_bytes(config)
    # Of all ranks together: with more of them than KV heads, a head is held more than once.
    block_bytes = tensor_parallel_size * Shard(0, tensor_parallel_size).of_spec(spec).block_bytes
    num_blocks = kv_cache_bytes // block_bytes
    needed = spec.num_blocks_for(max_model_len)
    if num_blocks < needed:
        raise ResourceError(
            f"Too little memory for the KV cache: one sequence of {max_model_len} tokens needs"
            f" {_mebibytes(needed * block_bytes)} and --kv-cache-memory-bytes is"
            f" {_mebibytes(kv_cache_bytes)}; raise it or lower --max-model-len."
        )
    return num_blocks


def _kv_cache_bytes(config: ServeConfig) -> int:
    given = config.kv_cache_memory_bytes
    return int(given) if given is not None else CPU_KV_CACHE_BYTES


def _worker_bytes(config: ServeConfig, checkpoint: CheckpointInfo, device: Device) -> dict[WorkerRole, int]:
    """Host memory of one worker. What a GPU holds is checked by the worker that has it."""
    # To a GPU the weights only pass through.
    on_cpu = device == "cpu"
    per_worker = _loading_bytes(config, checkpoint) + _kv_cache_bytes(config) if on_cpu else checkpoint.weight_bytes
    return {
        role: per_worker
        + PROCESS_BYTES * config.tensor_parallel_size_of(role)
        + int(config.kv_host_cache_bytes) * role.takes(Phase.PREFILL)
        for role in WorkerRole
    }


def _check_memory(
    config: ServeConfig, checkpoint: CheckpointInfo, device: Device, worker_bytes: Mapping[WorkerRole, int]
) -> None:
    """Of this machine."""
    purpose = f"and {_mebibytes(_kv_cache_bytes(config))} of KV cache " if device == "cpu" else ""
    needed = sum(worker_bytes[role] * config.num_workers_of(role) for role in WorkerRole)
    available = available_memory_bytes()
    if needed > available:
        raise ResourceError(
            f"Too little memory: {config.num_workers} workers with {_mebibytes(checkpoint.weight_bytes)} of weights"
            f" {purpose}each need {_mebibytes(needed)} in all; {_mebibytes(available)} are available."
        )


def _loading_bytes(config: ServeConfig, checkpoint: CheckpointInfo) -> int:
    """The most that a worker on a CPU holds of its weights at a time.

    Each layer is given back once it is packed; only the head is held three times for a moment: as loaded, in float32
    and packed. Weights that are to be int4 are packed in 8 bits before, to compare the model's structure.
    """
    head = checkpoint.vocab_size * checkpoint.hidden_size * DTYPE_BYTES["float32"]
    compared = checkpoint.num_parameters if config.quantization == "int4" else 0
    return checkpoint.weight_bytes + 2 * head + compared


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
