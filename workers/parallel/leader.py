"""The leader's side of a tensor-parallel group: rank 0, which has the scheduler, the sampler and the services."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import torch

from kvcache.errors import ResourceError
from kvcache.heads import Shard
from kvcache.sharded_storage import ShardedStorage
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.batching import StepPlan
from scheduler.types import DeviceProfile
from workers.model.step_model import StepModel
from workers.parallel import group_pb2 as pb
from workers.parallel.channel import Channel, Listener, LossWatch
from workers.parallel.messages import profile_from_wire, step_to_wire
from workers.parallel.rank import COLLECTIVE_TIMEOUT_S, Rank, RankLostError, end_waits, open_store, reduce_bytes
from workers.parallel.shared_memory import create_shared_memory, map_shared_memory, whole_pages
from workers.probe import ProbedModel, add_profiles, probe_device
from workers.step_progress import StepProgress
from workers.worker_options import WorkerOptions

START_TIMEOUT_S = 300.0  # for a follower to start and to load its share
EXPLANATION_TIMEOUT_S = 5.0  # for it to say why it could not

StartFollowers = Callable[[str], Callable[[], bool]]
"""Starts ranks 1 … size - 1, which call ``run_follower`` with this address; the result tells whether one has ended."""


class LeaderGroup:
    """The followers of one worker, and the memory that all its ranks share. They live and die together.

    When a follower is lost before ``close``, waits end in every rank and whoever ``watch``es is told.
    """

    def __init__(
        self, options: WorkerOptions, start_followers: StartFollowers, timeout_s: float = COLLECTIVE_TIMEOUT_S
    ) -> None:
        """Starts the followers and returns when all have come; they load their shares then.

        Raises:
            ResourceError: not all came, or there is no memory to share.
        """
        size = options.tensor_parallel_size
        self._on_lost: Callable[[str], None] | None = None
        self._lost_reason: str | None = None
        self._loss = threading.Lock()
        self._vocab_size = options.vocab_size
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # commands come from the step's thread and from the one that measures
        rank_bytes = rank_kv_bytes(options.spec, options.given_num_blocks, size)
        descriptors = [
            create_shared_memory("twinpool-kv", rank_bytes * size),
            create_shared_memory("twinpool-sums", reduce_bytes(size)),
        ]
        try:
            self._sums = map_shared_memory(descriptors[1], reduce_bytes(size))
            self.shards = [map_rank_storage(options, rank, descriptors[0]) for rank in range(size)]
            store, port = open_store(size)
            self._channels = _gather(size, start_followers)
            for channel in self._channels:
                channel.send(pb.Welcome(store_port=port).SerializeToString(), descriptors)
        except RankLostError as error:
            raise ResourceError(f"A tensor-parallel group of {size} ranks could not start: {error}.") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._watch = LossWatch(self._channels, lambda: self.lose("the process of a rank has ended"))
        try:
            self.rank = Rank(Shard(0, size), store, self._sums, timeout_s)
        except RuntimeError as error:  # gloo's
            problem = self.start_error()
            self.close()
            raise problem from error
        self.storage = ShardedStorage(options.spec, self.shards)

    def await_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when every follower has loaded its share. ``timeout_s`` for each.

        Raises:
            ResourceError: why one cannot.
        """
        for number, channel in enumerate(self._channels, start=1):
            channel.set_timeout(timeout_s)
            try:
                error = pb.Ready.FromString(bytes(channel.receive())).error
            except RankLostError as lost:
                error = str(lost)
            if error:
                raise ResourceError(f"Rank {number} of {len(self._channels) + 1} could not start: {error}")
            channel.set_timeout(self._timeout_s)

    def start_error(self) -> ResourceError:
        """What to raise when the ranks could not compute together while they were starting."""
        try:
            self.await_ready(EXPLANATION_TIMEOUT_S)
        except ResourceError as error:
            return error
        return ResourceError("The ranks of a tensor-parallel group do not reach each other.")

    def logits(self, model: StepModel, plan: StepPlan, progress: StepProgress | None = None) -> torch.Tensor:
        """Runs one step in all ranks. When it returns, every rank's KV of the step is written, and when ``progress``
        hears of a layer, every rank's KV of that layer.

        Raises:
            RankLostError: the group is lost, and whoever watches was told.
        """
        with self._lock:
            try:
                self._send(step_to_wire(plan))
                own = model.logits(plan, self.shards[0], progress).float()
                return torch.cat([own, *(self._receive_logits(rank, len(own)) for rank in self._followers())], dim=1)
            except BaseException as error:
                # Whatever it was: the other ranks are somewhere in the step, and nobody knows where.
                self.lose(f"a step failed: {type(error).__name__}: {error}")
                raise RankLostError("The tensor-parallel group is lost.") from error

    def measure(self, model: ProbedModel) -> DeviceProfile:
        """What all ranks can do at the same time, added up. ``model`` is this rank's share.

        Raises:
            RankLostError: a rank is gone.
        """
        with self._lock:
            self._send(pb.Command(measure=pb.Measure()))
            own = probe_device(model)
            rates = [pb.Rates.FromString(bytes(channel.receive())) for channel in self._channels]
        return add_profiles(own, [profile_from_wire(own, rate) for rate in rates])

    def lose(self, reason: str) -> None:
        """Ends the group: no rank waits for another any more. From any thread; the first reason counts."""
        with self._loss:
            if self._lost_reason is not None:
                return
            self._lost_reason = reason
            end_waits(self._sums)
            if self._on_lost is not None:
                self._on_lost(reason)

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """``on_lost`` is called with the reason when the group is lost, or now if it is already. From any thread."""
        with self._loss:
            self._on_lost = on_lost
            if self._lost_reason is not None:
                on_lost(self._lost_reason)

    def close(self) -> None:
        """Lets the followers end. No step may be running."""
        self._watch.stop()
        for channel in self._channels:
            channel.close()

    def _followers(self) -> range:
        return range(1, len(self._channels) + 1)

    def _send(self, command: pb.Command) -> None:
        payload = command.SerializeToString()
        for channel in self._channels:
            channel.send(payload)

    def _receive_logits(self, rank: int, num_rows: int) -> torch.Tensor:
        payload = self._channels[rank - 1].receive()
        width = len(Shard(rank, len(self.shards)).of(self._vocab_size))
        if not num_rows:
            return torch.empty(0, width)
        return torch.frombuffer(payload, dtype=torch.float32).view(num_rows, width)


class GroupModel:
    """A ``StepModel`` of which every rank computes a part. ``storage`` is not looked at: each rank has its own."""

    def __init__(self, group: LeaderGroup, model: StepModel) -> None:
        self._group = group
        self.own = model  # this rank's part

    def logits(self, plan: StepPlan, storage: PagedStorage, progress: StepProgress | None = None) -> torch.Tensor:
        """See ``StepModel.logits``; in float32."""
        return self._group.logits(self.own, plan, progress)


def rank_kv_bytes(spec: KVCacheSpec, num_blocks: int, size: int) -> int:
    """Shared memory of one rank's KV, in whole pages."""
    return whole_pages(PagedStorage.bytes_of(Shard(0, size).of_spec(spec), num_blocks))


def map_rank_storage(options: WorkerOptions, rank: int, descriptor: int) -> PagedStorage:
    """One rank's KV in the memory that the group shares."""
    shard = Shard(rank, options.tensor_parallel_size)
    spec = shard.of_spec(options.spec)
    stride = rank_kv_bytes(options.spec, options.given_num_blocks, shard.size)
    num_bytes = PagedStorage.bytes_of(spec, options.given_num_blocks)
    return PagedStorage(spec, options.given_num_blocks, memory=map_shared_memory(descriptor, num_bytes, rank * stride))


def _gather(size: int, start_followers: StartFollowers) -> list[Channel]:
    """Starts the followers; their channels, by rank."""
    listener = Listener()
    channels: dict[int, Channel] = {}
    try:
        has_one_ended = start_followers(listener.address)
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(channels) < size - 1:
            if has_one_ended() or time.monotonic() > deadline:
                raise RankLostError(f"{size - 1 - len(channels)} did not come")
            channel = listener.accept(timeout_s=0.5)
            if channel is not None:
                channel.set_timeout(EXPLANATION_TIMEOUT_S)
                channels[pb.Hello.FromString(bytes(channel.receive())).rank] = channel
    finally:
        listener.close()
    return [channels[rank] for rank in range(1, size)]
