"""The leader's side of a tensor-parallel group: rank 0, which has the scheduler, the sampler and the services."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import torch

from kvcache.errors import ModelError, ResourceError
from kvcache.heads import Shard
from kvcache.sharded_storage import ShardedStorage
from kvcache.storage import BlockStorage, PagedStorage
from scheduler.step_plan import StepPlan
from scheduler.types import DeviceProfile
from workers.device import gpu_of_rank
from workers.model.cuda_model import load_on_gpu
from workers.model.runner import load_step_model
from workers.model.step_model import StepModel
from workers.parallel import group_pb2 as pb
from workers.parallel.channel import Channel, Listener, LossWatch
from workers.parallel.kv_shares import KVShares, MappedShares, ServedShares
from workers.parallel.messages import profile_from_wire, step_to_wire
from workers.parallel.rank import COLLECTIVE_TIMEOUT_S, Rank, RankLostError, end_waits, open_store, reduce_bytes
from workers.parallel.shared_memory import create_shared_memory, map_shared_memory
from workers.probe import ProbedModel, add_profiles, probe_device
from workers.step_progress import StepProgress
from workers.worker_options import WorkerOptions

START_TIMEOUT_S = 300.0  # for a follower to start and to load its share
EXPLANATION_TIMEOUT_S = 5.0  # for it to say why it could not

StartFollowers = Callable[[str], Callable[[], bool]]
"""Starts ranks 1 … size - 1, which call ``run_follower`` with this address; the result tells whether one has ended."""


class LeaderGroup:
    """The followers of one worker, and what all its ranks share. They live and die together.

    ``shards`` are the ranks' KV, by rank, and ``storage`` is all of it as one; on GPUs they are there after ``load``.
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
        self._options = options
        self._timeout_s = timeout_s
        self._abort: Callable[[], None] = lambda: None  # until there is a rank
        self._lock = threading.Lock()  # commands come from the step's thread and from the one that measures
        on_gpu = options.device == "cuda"
        gpu = gpu_of_rank(0) if on_gpu else None
        self._kv: KVShares = ServedShares(options, timeout_s, self.lose) if on_gpu else MappedShares(options)
        sums = create_shared_memory("twinpool-sums", reduce_bytes(size))
        self._channels: list[Channel] = []
        try:
            self._sums = map_shared_memory(sums, reduce_bytes(size))
            store, port = open_store(size)
            self._channels = _gather(size, start_followers)
            welcome = pb.Welcome(store_port=port).SerializeToString()
            for rank, channel in enumerate(self._channels, start=1):
                channel.send(welcome, [self._kv.descriptor_of(rank), sums])
        except RankLostError as error:
            problem = ResourceError(f"A tensor-parallel group of {size} ranks could not start: {error}.")
            if self._channels:
                problem = self.start_error(error)  # a rank that has gone has said why
            for channel in (*self._channels, *self._kv.channels):
                channel.close()
            raise problem from error
        finally:
            self._kv.close_descriptors()
            os.close(sums)
        watched = [*self._channels, *self._kv.channels]
        self._watch = LossWatch(watched, lambda: self.lose("the process of a rank has ended"))
        try:
            self.rank = Rank(Shard(0, size), store, self._sums, timeout_s, gpu)
        except RuntimeError as error:  # gloo's
            problem = self.start_error(error)
            self.close()
            raise problem from error
        self._abort = self.rank.abort
        if self._kv.own is not None:
            self._take(self._kv.own)

    def load(self, report: Callable[[float], None] = lambda _part: None) -> GroupModel:
        """Loads the leader's share while the followers load theirs; returns when all have.

        Raises:
            ModelError: the checkpoint cannot be loaded or cut.
            ResourceError: not enough memory for KV, or why another rank cannot start.
        """
        try:
            model, own = load_share(self._options, self.rank, self._kv.own, report)
        except (RuntimeError, RankLostError, ModelError) as error:
            if isinstance(error, ModelError) and self._lost_reason is None:
                raise
            # Another rank did not come along: the first two say so, and what a GPU computes then means nothing.
            raise self.start_error(error) from error
        self._take(own)
        self.await_ready()
        return GroupModel(self, model)

    def _take(self, own: PagedStorage) -> None:
        self.own_storage = own
        self.shards: list[BlockStorage] = self._kv.all_of(own)
        self.storage = ShardedStorage(self._options.spec, self.shards)

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

    def start_error(self, cause: Exception) -> ResourceError:
        """What to raise when the ranks could not compute together while they were starting: what a follower says, or
        the ``cause`` as it is seen here."""
        try:
            self.await_ready(EXPLANATION_TIMEOUT_S)
        except ResourceError as error:
            return error
        reason = " ".join(str(cause).split())[:300]
        return ResourceError(f"The ranks of a tensor-parallel group do not reach each other: {reason}")

    def logits(self, model: StepModel, plan: StepPlan, progress: StepProgress | None = None) -> torch.Tensor:
        """Runs one step in all ranks. When it returns, every rank's KV of the step is written, and when ``progress``
        hears of a layer, every rank's KV of that layer.

        Raises:
            RankLostError: the group is lost, and whoever watches was told.
        """
        with self._lock:
            try:
                self._send(step_to_wire(plan))
                own = model.logits(plan, self.own_storage, progress)
                if self.rank.is_on_gpu:
                    logits = self.rank.gather_logits(own, self._options.vocab_size)
                    self._await_step_end()
                    return logits
                others = [self._receive_logits(rank, len(own)) for rank in self._followers()]
                return torch.cat([own.float(), *others], dim=1)
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
            own = probe_device(model, self.rank.device)
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
        self._abort()  # not under the lock: it may take a while

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """``on_lost`` is called with the reason when the group is lost, or now if it is already. From any thread."""
        with self._loss:
            self._on_lost = on_lost
            if self._lost_reason is not None:
                on_lost(self._lost_reason)

    def close(self) -> None:
        """Lets the followers end. No step may be running."""
        self._watch.stop()
        for channel in (*self._channels, *self._kv.channels):
            channel.close()

    def _followers(self) -> range:
        return range(1, len(self._channels) + 1)

    def _send(self, command: pb.Command) -> None:
        payload = command.SerializeToString()
        for channel in self._channels:
            channel.send(payload)

    def _await_step_end(self) -> None:
        """Of the followers: what they compute on a GPU may take longer than their logits."""
        for channel in self._channels:
            channel.receive()

    def _receive_logits(self, rank: int, num_rows: int) -> torch.Tensor:
        payload = self._channels[rank - 1].receive()
        width = len(Shard(rank, len(self.shards)).of(self._options.vocab_size))
        if not num_rows:
            return torch.empty(0, width)
        return torch.frombuffer(payload, dtype=torch.float32).view(num_rows, width)


class GroupModel:
    """A ``StepModel`` of which every rank computes a part. ``storage`` is not looked at: each rank has its own."""

    def __init__(self, group: LeaderGroup, model: StepModel) -> None:
        self._group = group
        self.own = model  # this rank's part

    def logits(self, plan: StepPlan, storage: PagedStorage, progress: StepProgress | None = None) -> torch.Tensor:
        """See ``StepModel.logits``; on CPUs in float32."""
        return self._group.logits(self.own, plan, progress)


def load_share(
    options: WorkerOptions,
    rank: Rank,
    mapped: PagedStorage | None,
    report: Callable[[float], None] = lambda _part: None,
) -> tuple[StepModel, PagedStorage]:
    """One rank's share of the model and its KV: ``mapped`` on a CPU, what its GPU has room for on a GPU.

    All ranks call this at the same time.

    Raises:
        ModelError, ResourceError: as ``load_step_model`` and ``load_on_gpu``.
        RuntimeError, RankLostError: another rank did not come along.
    """
    if mapped is None:
        return load_on_gpu(options, rank, report)
    return load_step_model(options, rank, report), mapped


def _gather(size: int, start_followers: StartFollowers) -> list[Channel]:
    """Starts the followers; their channels, by rank."""
    listener = Listener()
    channels: dict[int, Channel] = {}
    try:
        has_one_ended = start_followers(listener.address)
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(channels) < size - 1:
            channel = listener.accept(timeout_s=0.5)
            if channel is not None:
                channel.set_timeout(EXPLANATION_TIMEOUT_S)
                channels[pb.Hello.FromString(bytes(channel.receive())).rank] = channel
            elif has_one_ended() or time.monotonic() > deadline:  # one that has ended may have come before
                raise RankLostError(f"{size - 1 - len(channels)} did not come")
    finally:
        listener.close()
    return [channels[rank] for rank in range(1, size)]
