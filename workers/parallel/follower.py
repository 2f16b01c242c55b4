"""A follower of a tensor-parallel group: computes its share of every step that the leader sends."""

from __future__ import annotations

import logging
import os
import threading

import torch

from kvcache.errors import StartupError
from kvcache.heads import Shard
from kvcache.storage import PagedStorage
from workers.model.runner import load_step_model
from workers.model.step_model import StepModel
from workers.parallel import group_pb2 as pb
from workers.parallel.channel import Channel, LossWatch, connect
from workers.parallel.leader import map_rank_storage
from workers.parallel.messages import profile_to_wire, step_from_wire
from workers.parallel.rank import COLLECTIVE_TIMEOUT_S, Rank, RankLostError, end_waits, join_store, reduce_bytes
from workers.parallel.shared_memory import map_shared_memory
from workers.probe import probe_device, probed_model
from workers.worker_options import WorkerOptions

END_GRACE_S = 5.0  # to leave a step by itself after the leader has gone
logger = logging.getLogger(__name__)


def run_follower(options: WorkerOptions, rank: int, address: str, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> None:
    """Serves the leader at ``address`` until it goes away, whichever way.

    A follower that cannot go on ends with an exception, and its process must end then: that is how the leader learns.
    """
    torch.set_num_threads(options.num_threads)
    channel = connect(address)
    channel.send(pb.Hello(rank=rank).SerializeToString())
    finished = threading.Event()
    try:
        storage, peers, watch = _join(options, Shard(rank, options.tensor_parallel_size), channel, finished, timeout_s)
        try:
            model = load_step_model(options, peers)
        except StartupError as error:
            channel.send(pb.Ready(error=str(error)).SerializeToString())
            raise
        channel.send(pb.Ready().SerializeToString())
        _serve(options, rank, channel, model, storage)
        finished.set()
        watch.stop()
    finally:
        finished.set()
        channel.close()


def _join(
    options: WorkerOptions, shard: Shard, channel: Channel, finished: threading.Event, timeout_s: float
) -> tuple[PagedStorage, Rank, LossWatch]:
    payload, (kv, sums) = channel.receive_with_descriptors()
    try:
        storage = map_rank_storage(options, shard.rank, kv)
        memory = map_shared_memory(sums, reduce_bytes(shard.size))
    finally:
        os.close(kv)
        os.close(sums)
    store = join_store(pb.Welcome.FromString(bytes(payload)).store_port, shard.size)
    watch = LossWatch([channel], lambda: _leave(memory, finished))
    return storage, Rank(shard, store, memory, timeout_s), watch


def _leave(memory: torch.Tensor, finished: threading.Event) -> None:
    """The leader is gone: a step that waits for it ends by itself, or the process does."""
    end_waits(memory)
    if not finished.wait(END_GRACE_S):
        logger.critical("The leader is gone and a step does not end; the process does.")
        os._exit(1)


def _serve(options: WorkerOptions, rank: int, channel: Channel, model: StepModel, storage: PagedStorage) -> None:
    while True:
        try:
            command = pb.Command.FromString(bytes(channel.receive()))
        except RankLostError:
            return  # between two commands this is how a leader says that it was all
        if command.HasField("step"):
            logits = model.logits(step_from_wire(command.step), storage).float().contiguous()
            channel.send(memoryview(logits.numpy().data).cast("B") if logits.numel() else b"")
        elif command.HasField("measure"):
            device = probe_device(probed_model(options, model, Shard(rank, options.tensor_parallel_size)))
            channel.send(profile_to_wire(device).SerializeToString())
