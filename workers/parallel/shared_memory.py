"""Memory that the processes of a tensor-parallel group share. It has no name: it is gone with the last of them."""

from __future__ import annotations

import mmap
import os

import torch

from kvcache.errors import ResourceError

PAGE_BYTES = mmap.PAGESIZE


def whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def create_shared_memory(name: str, num_bytes: int) -> int:
    """A file descriptor of ``num_bytes`` zeros; pages are taken when they are first written.

    Raises:
        ResourceError: the system does not give it.
    """
    if not hasattr(os, "memfd_create"):
        raise ResourceError("Tensor parallelism needs Linux: its processes share memory without a name.")
    try:
        descriptor = os.memfd_create(name)
        os.ftruncate(descriptor, num_bytes)
    except OSError as error:
        raise ResourceError(f"There are no {num_bytes} bytes of shared memory: {error.strerror}.") from error
    return descriptor


def map_shared_memory(descriptor: int, num_bytes: int, offset: int = 0) -> torch.Tensor:
    """uint8 ``[num_bytes]`` from ``offset``, a multiple of ``PAGE_BYTES``; outlives the descriptor."""
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes, offset=offset), dtype=torch.uint8)
