"""A follower of a tensor-parallel group: computes its share of every step that the leader sends."""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass

import torch

from kvcache.errors import StartupError
from kvcache.heads import Shard
from kvcache.storage import PagedStorage
from workers.device import gpu_of_rank, use_device
from workers.model.step_model import StepModel
from workers.parallel import group_pb2 as pb
from workers.parallel.channel import Channel, LossWatch, connect
from workers.parallel.kv_shares import map_rank_storage, serve_blocks
from workers.parallel.leader import load_share
from workers.parallel.messages import profile_to_wire, step_from_wire
from workers.parallel.rank import COLLECTIVE_TIMEOUT_S, Rank, RankLostError, end_waits, join_store, reduce_bytes
from workers.parallel.shared_memory import map_shared_memory
from workers.probe import probe_device, probed_model
from workers.worker_options import WorkerOptions

END_GRACE_S = 5.0  # to leave a step by itself after the leader has gone
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Joined:
    """What a follower has of its group before its model is loaded."""

    rank: Rank
    watch: LossWatch
    mapped: PagedStorage | None  # its KV, where the leader maps it too
    asked: Channel | None  # where not: on this the leader asks for blocks


def run_follower(options: WorkerOptions, rank: int, address: str, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> None:
    """Serves the leader at ``address`` until it goes away, whichever way.

    A follower that cannot go on ends with an exception, and its process must end then: that is how the leader learns.
    """
    torch.set_num_threads(options.num_threads)
    channel = connect(address)
    channel.send(pb.Hello(rank=rank).SerializeToString())
    finished = threading.Event()
    try:
        joined: _Joined | None = None
        try:
            joined = _join(options, Shard(rank, options.tensor_parallel_size), channel, finished, timeout_s)
            model, storage = load_share(options, joined.rank, joined.mapped)
        except StartupError as error:
            if joined is not None and joined.asked is not None:
                joined.asked.close()
            channel.send(pb.Ready(error=str(error)).SerializeToString())
            raise
        if joined.asked is not None:
            arguments = (joined.asked, storage, joined.rank.device)
            threading.Thread(target=_serve_kv, args=arguments, name="rank-kv", daemon=True).start()
        channel.send(pb.Ready().SerializeToString())
        _serve(options, joined.rank, channel, model, storage)
        finished.set()
        joined.watch.stop()
    finally:
        finished.set()
        channel.close()


def _join(
    options: WorkerOptions, shard: Shard, channel: Channel, finished: threading.Event, timeout_s: float
) -> _Joined:
    gpu = _take_gpu(shard.rank) if options.device == "cuda" else None
    payload, (kv, sums) = channel.receive_with_descriptors()
    mapped = asked = None
    try:
        if gpu is None:
            mapped = map_rank_storage(options, shard.rank, kv)
        else:
            asked = Channel(socket.socket(fileno=os.dup(kv)))
        memory = map_shared_memory(sums, reduce_bytes(shard.size))
    finally:
        os.close(kv)
        os.close(sums)
    store = join_store(pb.Welcome.FromString(bytes(payload)).store_port, shard.size)
    watch = LossWatch([channel], lambda: _leave(memory, finished))
    return _Joined(Rank(shard, store, memory, timeout_s, gpu), watch, mapped, asked)


def _take_gpu(rank: int) -> str:
    gpu = gpu_of_rank(rank)
    use_device(gpu)
    return gpu


def _leave(memory: torch.Tensor, finished: threading.Event) -> None:
    """The leader is gone: a step that waits for it ends by itself, or the process does."""
    end_waits(memory)
    if not finished.wait(END_GRACE_S):
        logger.critical("The leader is gone and a step does not end; the process does.")
        os._exit(1)


def _serve(options: WorkerOptions, rank: Rank, channel: Channel, model: StepModel, storage: PagedStorage) -> None:
    while True:
        try:
            command = pb.Command.FromString(bytes(channel.receive()))
        except RankLostError:
            return  # between two commands this is how a leader says that it was all
        if command.HasField("step"):
            logits = model.logits(step_from_wire(command.step), storage)
            if rank.is_on_gpu:
                rank.gather_logits(logits, options.vocab_size)
                storage.synchronize()
                channel.send(b"")
            else:
                logits = logits.float().contiguous()
                channel.send(memoryview(logits.numpy().data).cast("B") if logits.numel() else b"")
        elif command.HasField("measure"):
            device = probe_device(probed_model(options, model, rank.shard), rank.device)
            channel.send(profile_to_wire(device).SerializeToString())


def _serve_kv(channel: Channel, storage: PagedStorage, device: str) -> None:
    """Beside the steps, in a thread of its own."""
    use_device(device)
    serve_blocks(channel, storage)
