"""What one rank of a tensor-parallel group computes together with the others."""

from __future__ import annotations

import ctypes
import socket
from datetime import timedelta
from typing import Any

import torch

from kvcache.errors import TwinpoolError
from kvcache.heads import Shard
from workers.native.library import Group, load_library
from workers.parallel.shared_memory import PAGE_BYTES, whole_pages

distributed: Any = torch.distributed  # its type stubs miss the classes used here
Store = Any  # its TCPStore

LOOPBACK = "127.0.0.1"
COLLECTIVE_TIMEOUT_S = 60.0  # a rank that is so late is lost


def reduce_bytes(size: int) -> int:
    """Shared memory for the sums of a group of ``size`` ranks."""
    library = load_library()
    return whole_pages(library.twinpool_group_bytes(size)) if library is not None else PAGE_BYTES


def open_store(size: int) -> tuple[Store, int]:
    """The leader's rendezvous for gloo, and its port. On loopback only: by itself it would listen on every address."""
    listening = socket.socket()
    listening.bind((LOOPBACK, 0))
    listening.listen()
    port: int = listening.getsockname()[1]
    options = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listening.detach()}
    return distributed.TCPStore(LOOPBACK, port, size, **options), port


def join_store(port: int, size: int) -> Store:
    """A follower's end of ``open_store``."""
    return distributed.TCPStore(LOOPBACK, port, size, is_master=False, wait_for_workers=False)


def end_waits(memory: torch.Tensor) -> None:
    """Makes every rank's wait for a native sum return, now and ever after. From any thread."""
    ctypes.c_uint32.from_address(memory.data_ptr()).value = 1


class RankLostError(TwinpoolError):
    """A process of the group is gone or does not answer; the group cannot go on."""


class Rank:
    """One rank's end of the group's sums. One thread at a time computes; every rank calls the same in the same order.

    Modules of ``torch`` sum through gloo; the native decoder through memory that the ranks share, which is some ten
    times faster for the few kilobytes of a decoding step.
    """

    def __init__(self, shard: Shard, store: Store, memory: torch.Tensor, timeout_s: float) -> None:
        """Returns when all ranks are here. ``memory``: ``reduce_bytes`` of zeros, shared by all of them."""
        self.shard = shard
        self._memory = memory  # the native group points into it
        self.native_group = Group(shard.rank, shard.size, 0, round(timeout_s * 1000), memory.data_ptr())
        gloo = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=LOOPBACK)]
        options._timeout = timedelta(seconds=timeout_s)
        self._process_group = gloo(store, shard.rank, shard.size, options)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``partial``, added up in float32, the same to the last bit in every rank.

        Raises:
            RuntimeError: another rank is lost.
        """
        total = partial.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        self._process_group.allreduce([total]).wait()
        return total.to(partial.dtype)

    def largest(self, value: float) -> float:
        """The largest of every rank's ``value``."""
        options = distributed.AllreduceOptions()
        options.reduceOp = distributed.ReduceOp.MAX
        values = torch.tensor([value], dtype=torch.float64)
        self._process_group.allreduce([values], options).wait()
        return values.item()
