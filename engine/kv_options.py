"""Options of KV that outlives a sequence or leaves its worker: prefix cache, tiers, handoffs."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ByteSize, model_validator

from engine.option import option
from kvcache.transfer.port_choice import PortName


class KVOptions(BaseModel):
    """Part of ``engine.config.ServeConfig``."""

    enable_prefix_caching: bool = option(
        True, "KV cache and batching", "keep the KV of prompts and answers for prompts that begin the same"
    )
    kv_transfer_dtype: Literal["auto", "native", "int8", "fp8"] = option(
        "native",
        "KV cache and batching",
        "dtype of KV between pools; auto is int8 where the link would delay the first token, else as it is kept",
        "DTYPE",
    )
    kv_host_cache_bytes: ByteSize = option(
        0,
        "KV cache and batching",
        "evicted KV that each worker that prefills keeps in the host's memory, e.g. 4GiB (default: none)",
        "SIZE",
    )
    kv_file_cache_dir: str | None = option(
        None,
        "KV cache and batching",
        "folder for KV that does not fit there either; with --kv-file-cache-bytes",
        "FOLDER",
        min_length=1,
    )
    kv_file_cache_bytes: ByteSize | None = option(
        None, "KV cache and batching", "size of each such worker's files there, e.g. 50GiB", "SIZE"
    )
    kv_offer_rate: ByteSize = option(
        0,
        "KV cache and batching",
        "KV that a decode worker may send back per second for the next turn, e.g. 100MiB (default: none)",
        "SIZE",
    )
    kv_transfer_port: PortName = option(
        "auto",
        "KV cache and batching",
        "how KV goes from worker to worker: grpc, shm (shared memory), auto (shm on one host, else grpc),"
        " rdma (needs the extra rdma), or rdma-tcp (the same library over TCP)",
        "PORT",
    )

    @model_validator(mode="after")
    def _check_tiers(self) -> Self:
        if (self.kv_file_cache_dir is None) != (not self.kv_file_cache_bytes):
            raise ValueError("kv_file_cache_dir and kv_file_cache_bytes need each other: where, and how much")
        if (self.kv_host_cache_bytes or self.kv_file_cache_bytes) and not self.enable_prefix_caching:
            raise ValueError("KV tiers keep what prefix caches evict, and enable_prefix_caching is off")
        return self
