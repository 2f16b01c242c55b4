"""Options of KV: how workers keep it, and where it outlives a sequence or leaves its worker."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ByteSize, model_validator

from engine.option import option
from kvcache.transfer.port_choice import PortName

KVCacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]


class KVOptions(BaseModel):
    """Part of ``engine.config.ServeConfig``."""

    block_size: int = option(16, "KV cache and batching", "tokens per KV block", ge=1, le=1024)
    prefill_block_size: int | None = option(
        None, "KV cache and batching", "the same for prefill workers alone (default: --block-size)", ge=1, le=1024
    )
    decode_block_size: int | None = option(
        None, "KV cache and batching", "the same for decode workers alone (default: --block-size)", ge=1, le=1024
    )
    kv_cache_memory_bytes: ByteSize | None = option(
        None,
        "KV cache and batching",
        "KV cache of each worker, e.g. 512MiB (default: 1GiB; on a GPU what --gpu-memory-utilization leaves)",
        "SIZE",
    )
    gpu_memory_utilization: float | None = option(
        None,
        "KV cache and batching",
        "part of its GPU's memory that a worker uses in all (default: 0.9)",
        "FRACTION",
        gt=0,
        le=1,
    )
    kv_cache_dtype: KVCacheDtype = option(
        "auto", "KV cache and batching", "dtype of keys and values; auto is the model's", "DTYPE"
    )
    prefill_kv_cache_dtype: KVCacheDtype | None = option(
        None, "KV cache and batching", "the same for prefill workers alone (default: --kv-cache-dtype)", "DTYPE"
    )
    decode_kv_cache_dtype: KVCacheDtype | None = option(
        None, "KV cache and batching", "the same for decode workers alone (default: --kv-cache-dtype)", "DTYPE"
    )
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
