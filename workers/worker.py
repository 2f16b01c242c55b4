"""One worker: a model, its KV cache, its roles and its gRPC server. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import grpc
import torch

from kvcache.errors import ResourceError, TransferFault
from kvcache.manager import KVCacheManager
from kvcache.storage import BlockStorage, PagedStorage
from kvcache.transfer.grpc_port import KVTransferService
from kvcache.transfer.port_choice import takes_shm
from kvcache.transfer.ports import make_port, open_memory
from kvcache.transfer.rdma_service import RdmaService
from kvcache.transfer.receiver import KVReceiver, ReceivedKV
from kvcache.transfer.shm_service import ShmService
from scheduler.batching import Batcher
from scheduler.events import WorkerReported
from scheduler.types import DeviceProfile, WorkerInfo, WorkerLoad
from workers import worker_pb2_grpc
from workers.cache_news import CacheNews
from workers.channels import SERVER_OPTIONS, ChannelPool
from workers.decode import DecodeRole
from workers.kv_tiers import make_tiers
from workers.model.cuda_model import load_on_gpu
from workers.model.identity import checkpoint_digest
from workers.model.runner import ModelRunner, load_step_model
from workers.offers import OfferMaker, OfferTaker
from workers.parallel.leader import GroupModel, LeaderGroup, StartFollowers
from workers.prefill import PrefillRole
from workers.probe import probe_device, probed_model
from workers.service import SequenceLimits, WorkerService
from workers.step_loop import StepLoop
from workers.tls import TlsFolder
from workers.transfer_dtype import WireFormat
from workers.worker_options import WorkerOptions

logger = logging.getLogger(__name__)


class Worker:
    """Everything but ``__init__`` runs on one event loop; the model's steps run in a thread of their own."""

    def __init__(
        self, options: WorkerOptions, runner: ModelRunner, storage: BlockStorage, group: LeaderGroup | None = None
    ) -> None:
        """``group``: the other ranks, when the worker is tensor-parallel; closed by ``stop``."""
        self.options = options
        self.group = group
        self.manager = KVCacheManager(
            options.spec, storage.num_blocks, options.lease_ttl_s, prefix_caching=options.prefix_caching
        )
        self._runner = runner
        self.step_loop = StepLoop(Batcher(self.manager, options.limits), runner)
        self.address = ""
        self._tls = None if options.tls_folder is None else TlsFolder(options.tls_folder)
        self._channels = ChannelPool(self._tls)
        failures: Counter[TransferFault] = Counter()
        self._decode = DecodeRole(self.step_loop, time.monotonic, self._channels, lambda: self.address, failures)
        self._memory = open_memory(options.kv_transfer_port, options.host)
        port = make_port(options.kv_transfer_port, lambda address: self._channels(address).channel, self._memory)
        self.offers = OfferMaker(
            self.manager, storage, time.monotonic, self._channels, port, options.kv_offer_rate, options.lease_ttl_s
        )
        self.offers_taken = OfferTaker(self.manager, time.monotonic)
        self._decode.on_turn_end = self.offers.offer
        self.wire = WireFormat(storage, options.kv_transfer_dtype, self.step_loop.prefill_rate)
        self._prefill = PrefillRole(
            self.step_loop, storage, time.monotonic, port, lease_ttl_s=options.lease_ttl_s, wire=self.wire
        )
        self.transfers = KVReceiver(self.manager, storage, time.monotonic, self._receive, failures)
        self._shm = ShmService(self.transfers) if takes_shm(options.kv_transfer_port) else None
        self.tiers = make_tiers(options, self.manager, storage, self.step_loop.prefill_rate)
        if self.tiers is not None:
            self.step_loop.bring_back = self.tiers.bring_back
        self.cache_news = CacheNews(self.manager.pool.prefixes)
        self._server: grpc.aio.Server | None = None
        self._stepping: asyncio.Task[None] | None = None
        self._offering: asyncio.Task[None] | None = None

    def _receive(self, received: ReceivedKV) -> None:
        if received.request_id in self.offers_taken:
            self.offers_taken.receive(received.request_id)
        else:
            self._decode.receive(received)

    async def start(self) -> None:
        """Binds a free port of the host and begins to serve; ``address`` is known afterwards.

        Raises:
            ResourceError: the host cannot be bound.
        """
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(self._service(), self._server)
        KVTransferService(self.transfers).add_to(self._server)
        if self._memory is not None:
            RdmaService(self.transfers, self._memory).add_to(self._server)
        try:
            port = self._listen(self._server)
        except RuntimeError as error:
            raise ResourceError(f"Worker {self.options.worker_id} cannot listen on {self.options.host}.") from error
        self.address = f"{self.options.host}:{port}"
        self._start_shm()
        await self._server.start()
        self._stepping = asyncio.create_task(self.step_loop.run())
        self._offering = asyncio.create_task(self.offers.run())

    def _listen(self, server: grpc.aio.Server) -> int:
        address = f"{self.options.host}:0"
        if self._tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._tls.server_credentials())

    def _start_shm(self) -> None:
        if self._shm is None:
            return
        try:
            self._shm.start(self.address)
        except OSError as error:
            if self.options.kv_transfer_port == "shm":
                raise ResourceError(f"Worker {self.options.worker_id} cannot take KV through shared memory.") from error
            logger.warning("Worker %s takes KV over gRPC only: %s", self.options.worker_id, error)

    @property
    def stepping(self) -> asyncio.Task[None]:
        """The step loop of a started worker. It ends by ``stop``; what it raises is always a bug."""
        assert self._stepping is not None, "start was not called"
        return self._stepping

    async def stop(self) -> None:
        """Refuses new calls, ends running ones and gives everything back."""
        if self._server is not None:
            await self._server.stop(None)
        if self._shm is not None:
            await self._shm.stop()
        for task in (self._offering, self._stepping):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        if self.tiers is not None:
            await self.tiers.close()
        self.step_loop.close()
        if self.group is not None:
            self.group.close()
        await self._channels.close()

    def move_away(self, *, moves: bool) -> None:
        """See ``DecodeRole.move_away``. Prompts are still computed and delivered: that takes seconds."""
        self._decode.move_away(moves=moves)

    def measure(self) -> DeviceProfile:
        """What the worker's device can do, with all its ranks at once, or is said to. Not on the event loop."""
        options = self.options
        if options.device_profile is not None:
            return options.device_profile
        if self.group is not None:
            model = self._runner.model
            own = model.own if isinstance(model, GroupModel) else model
            return self.group.measure(probed_model(options, own, self.group.rank.shard))
        return probe_device(probed_model(options, self._runner.model), options.device)

    def info(self, incarnation: int, device: DeviceProfile) -> WorkerInfo:
        """What it says of itself, in the role that it was started in."""
        options = self.options
        return WorkerInfo(
            options.worker_id,
            incarnation,
            options.role,
            self.address,
            os.getpid(),
            device,
            options.model_name,
            options.max_model_len,
            options.spec,
            self.manager.num_blocks,
            options.shape,
            options.tensor_parallel_size,
            options.limits.max_num_seqs,
            options.limits.max_num_batched_tokens,
            options.vocab_size,
            metadata.version("twinpool"),
            checkpoint=checkpoint_digest(Path(options.model_path)),
        )

    def load(self) -> WorkerLoad:
        batcher, transfers = self.step_loop.batcher, self.transfers
        return WorkerLoad(
            running=batcher.num_running,
            waiting=batcher.num_waiting,
            blocks_free=self.manager.num_free,
            blocks_leased=self.manager.leases.num_blocks,
            blocks_unaccounted=self.manager.num_unaccounted(),
            prompt_tokens_computed=self.step_loop.prompt_tokens_computed,
            generation_tokens=self.step_loop.generation_tokens,
            preemptions=batcher.num_preemptions,
            prefix_cache_queries=batcher.prefix_cache_queries,
            prefix_cache_hits=batcher.prefix_cache_hits,
            transfers=transfers.transfers,
            transfer_bytes=transfers.payload_bytes,
            transfer_seconds=transfers.receive_seconds,
            transfer_failures=tuple((fault.value, count) for fault, count in transfers.failures.items()),
            blocks_resumed=batcher.num_resumed_blocks,
            transfers_compressed=self.wire.num_compressed,
            tiers=self.tiers.loads() if self.tiers is not None else (),
            offered_bytes=self.offers.sent_bytes,
            offers_dropped=self.offers.num_dropped,
        )

    def report(self, incarnation: int) -> WorkerReported:
        """A heartbeat; what steps and handoffs took, and what came to the cache and went, is told once."""
        return WorkerReported(
            self.options.worker_id,
            incarnation,
            self.load(),
            self.step_loop.times.take(),
            self._prefill.times.take(),
            self.cache_news.take(),
        )

    def _service(self) -> WorkerService:
        """Both roles, whichever it has: a request that was placed here before the role changed ends here."""
        limits = SequenceLimits(self.options.max_model_len, self.options.vocab_size)
        return WorkerService(limits, self._prefill, self._decode, self.offers_taken)


def build_worker(
    options: WorkerOptions,
    start_followers: StartFollowers | None = None,
    report: Callable[[float], None] = lambda _part: None,
) -> Worker:
    """Loads the model and takes the memory of the KV cache. ``report`` hears how far that is, from 0 to 1.

    Args:
        start_followers: starts the other ranks of a tensor-parallel worker.

    Raises:
        ModelError: the checkpoint cannot be loaded.
        ResourceError: not enough memory for the KV cache, or another rank cannot start.
    """
    torch.set_num_threads(options.num_threads)
    if options.tensor_parallel_size > 1:
        assert start_followers is not None, "a tensor-parallel worker has other ranks"
        return _build_leader(options, start_followers, report)
    if options.device == "cuda":
        step_model, storage = load_on_gpu(options, report=report)
    else:
        step_model = load_step_model(options, report=report)
        storage = _take_storage(options)
    return Worker(options, ModelRunner(step_model, storage), storage)


def _take_storage(options: WorkerOptions) -> PagedStorage:
    try:
        return PagedStorage(options.spec, options.given_num_blocks)
    except RuntimeError as error:  # torch's allocator
        raise ResourceError(f"No memory for {options.given_num_blocks} KV blocks: {error}") from error


def _build_leader(options: WorkerOptions, start_followers: StartFollowers, report: Callable[[float], None]) -> Worker:
    group = LeaderGroup(options, start_followers)
    try:
        model = group.load(report)
    except BaseException:
        group.close()  # the followers end
        raise
    return Worker(options, ModelRunner(model, group.own_storage), group.storage, group)
