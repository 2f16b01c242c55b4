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
ProcessGroup = Any  # its ProcessGroupGloo or ProcessGroupNCCL

LOOPBACK = "127.0.0.1"
COLLECTIVE_TIMEOUT_S = 60.0  # a rank that is so late is lost


def reduce_bytes(size: int) -> int:
    """Shared memory for the sums of a group of ``size`` ranks."""
    library = load_library()
    return whole_pages(library.twinpool_group_bytes(size)) if library is not None else PAGE_BYTES


def open_store(size: int) -> tuple[Store, int]:
    """The leader's rendezvous for torch.distributed, and its port. On loopback only: by itself it would listen on
    every address."""
    listening = socket.socket()
    listening.bind((LOOPBACK, 0))
    listening.listen()
    port: int = listening.getsockname()[1]
    options = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listening.detach()}
    return distributed.TCPStore(LOOPBACK, port, size, **options), port


def join_store(port: int, size: int) -> Store:
    """A follower's end of ``open_store``."""
    return distributed.TCPStore(LOOPBACK, port, size, is_master=False, wait_for_workers=False)


def open_gloo(store: Store, shard: Shard, timeout_s: float) -> ProcessGroup:
    """For tensors in the host's memory, over loopback. Returns when all ranks are here."""
    gloo = distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=LOOPBACK)]
    options._timeout = timedelta(seconds=timeout_s)
    return gloo(distributed.PrefixStore("gloo", store), shard.rank, shard.size, options)


def open_nccl(store: Store, shard: Shard, timeout_s: float) -> ProcessGroup:
    """For tensors on GPUs, a GPU for each rank. The ranks meet at the first sum."""
    nccl = distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return nccl(distributed.PrefixStore("nccl", store), shard.rank, shard.size, options)


def end_waits(memory: torch.Tensor) -> None:
    """Makes every rank's wait for a native sum return, now and ever after. From any thread."""
    ctypes.c_uint32.from_address(memory.data_ptr()).value = 1


class RankLostError(TwinpoolError):
    """A process of the group is gone or does not answer; the group cannot go on."""


class Rank:
    """One rank's end of the group's sums. One thread at a time computes; every rank calls the same in the same order.

    On CPUs modules of ``torch`` sum through gloo, and the native decoder through memory that the ranks share, which is
    some ten times faster for the few kilobytes of a decoding step. On GPUs modules sum through NCCL; the calls are
    those of gloo, so a test may put gloo in its place.
    """

    def __init__(
        self, shard: Shard, store: Store, memory: torch.Tensor, timeout_s: float, gpu: str | None = None
    ) -> None:
        """Returns when all ranks are here.

        Args:
            memory: ``reduce_bytes`` of zeros, shared by all of them.
            gpu: this rank's own, as torch calls it; None: all ranks are on CPUs.
        """
        self.shard = shard
        self.device = gpu if gpu is not None else "cpu"
        self._memory = memory  # the native group points into it
        self.native_group = Group(shard.rank, shard.size, 0, round(timeout_s * 1000), memory.data_ptr())
        self._host_group = open_gloo(store, shard, timeout_s)
        self._gpu_group = open_nccl(store, shard, timeout_s) if gpu is not None else None

    @property
    def is_on_gpu(self) -> bool:
        return self._gpu_group is not None

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``partial``, added up in float32, the same to the last bit in every rank.

        Raises:
            RuntimeError: another rank is lost.
        """
        total = partial.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        group = self._gpu_group if self._gpu_group is not None else self._host_group
        group.allreduce([total]).wait()
        return total.to(partial.dtype)

    def gather_logits(self, part: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Between GPUs: every rank's part of the same rows side by side, in every rank.

        Args:
            part: ``[S, tokens of this rank's share]``, where it was computed.

        Returns:
            ``[S, vocab_size]``, there as well.

        Raises:
            RuntimeError: another rank is lost.
        """
        assert self._gpu_group is not None, "on a CPU the sockets are faster than gloo"
        shares = [len(Shard(rank, self.shard.size).of(vocab_size)) for rank in range(self.shard.size)]
        if not len(part):
            return part.new_empty(0, vocab_size)
        # Gloo, unlike NCCL, gathers equal shapes only; shares differ by one token at most.
        padded = torch.nn.functional.pad(part, (0, max(shares) - part.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in shares]
        self._gpu_group.allgather([parts], [padded]).wait()
        return torch.cat([each[:, :share] for each, share in zip(parts, shares, strict=True)], dim=1)

    def largest(self, value: float) -> float:
        """The largest of every rank's ``value``."""
        options = distributed.AllreduceOptions()
        options.reduceOp = distributed.ReduceOp.MAX
        values = torch.tensor([value], dtype=torch.float64)
        self._host_group.allreduce([values], options).wait()
        return values.item()

    def abort(self) -> None:
        """Ends what waits for other ranks on this rank's GPU, now and ever after, with results that mean nothing."""
        if self._gpu_group is not None:
            self._gpu_group.abort()
