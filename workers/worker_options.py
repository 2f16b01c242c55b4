"""What a worker process is told when it is started. Imports nothing heavy: the command builds it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvcache.spec import KVCacheSpec
from kvcache.transfer.port_choice import PortName
from scheduler.batching import BatchLimits
from scheduler.room import Room
from scheduler.types import DeviceProfile, ModelShape, WorkerRole
from workers.device import Device

TransferDtype = Literal["auto", "native", "int8", "fp8"]
ANY_ROOM = Room()
NODE_ADDRESS = "node"  # as ``WorkerOptions.host``: that of the node where the worker happens to run


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """Constant for the life of the worker, restarts included."""

    worker_id: str
    role: WorkerRole
    model_path: str
    model_name: str
    spec: KVCacheSpec
    shape: ModelShape
    num_blocks: int | None  # None on a GPU: as many as ``gpu_memory_utilization`` leaves room for
    max_model_len: int
    vocab_size: int
    dtype: str  # of the model; the spec has that of the KV
    limits: BatchLimits
    host: str = "127.0.0.1"  # or NODE_ADDRESS
    model_source: str = ""  # what the operator calls the model: fetched where ``model_path`` does not exist
    changes_role: bool = False  # the scheduler may give it the other role as the load changes
    room: Room = ANY_ROOM  # what it takes of a node
    num_threads: int = 1  # of each rank
    tensor_parallel_size: int = 1  # ranks that compute the model together; ``spec`` has the heads of all
    lease_ttl_s: float = 10.0
    device: Device = "cpu"
    device_profile: DeviceProfile | None = None  # given instead of measured
    gpu_memory_utilization: float = 0.9
    prefix_caching: bool = True
    kv_transfer_dtype: TransferDtype = "native"
    kv_host_cache_bytes: int = 0  # evicted blocks that a worker that prefills keeps in the host's memory
    kv_file_cache_dir: str = ""
    kv_file_cache_bytes: int = 0  # and in files there
    kv_offer_rate: int = 0  # bytes per second that a decode worker may send back after turns; 0: none
    quantization: str = "none"  # or "int8", "int4"
    kv_transfer_port: PortName = "auto"
    tls_folder: str | None = None  # of this process's TlsFolder; None: gRPC is open to whoever reaches the port
    log_level: str = "info"

    @property
    def given_num_blocks(self) -> int:
        """``num_blocks`` of a worker that is told how many."""
        assert self.num_blocks is not None, "only a worker on a GPU works it out"
        return self.num_blocks
