"""Real workers, gateway and controller in one event loop, over loopback gRPC: a cluster without Ray.

A model of random weights is saved once per session; what it should answer comes from ``transformers`` alone.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import torch
from transformers import LlamaConfig, PreTrainedConfig

from engine.gateway import AsyncEngine
from engine.outputs import SOMEBODY, Origin, ServedModel, TextDelta
from engine.scheduler_client import SchedulerClient
from engine.tokenizer import Tokenizer
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from kvcache.transfer.wire import Chunk, Message
from scheduler.admission import AdmissionControl, AdmissionOptions
from scheduler.batching import BatchLimits
from scheduler.controller import ClusterController
from scheduler.delivery import Delivery
from scheduler.events import Command, Event, PlaceRequest, WorkerRegistered
from scheduler.placement import PlacementOptions
from scheduler.request import FinishReason, SamplingParams, TokenLogprobs
from scheduler.step_plan import StepOutput, StepPlan
from scheduler.types import ClusterSnapshot, DeviceProfile, Placement, WorkerLoad, WorkerRole
from tests.builders import make_shape
from tests.fakes import MODEL_NAME, tiny_backend
from tests.families import load_reference, save_model
from tests.leaks import check_no_leaks, until
from tests.ranks import ThreadRanks
from workers import worker_pb2_grpc
from workers.channels import ChannelPool
from workers.model.architecture import check_architecture, load_config, read_sizes
from workers.model.runner import ModelRunner, load_step_model
from workers.model.sampler import sample
from workers.model.step_model import PreparedInputs
from workers.parallel.leader import GroupModel, LeaderGroup
from workers.step_progress import StepProgress
from workers.tls import TlsFolder
from workers.worker import Worker
from workers.worker_options import WorkerOptions

MAX_MODEL_LEN = 512
BLOCK_SIZE = 16
DEVICE = DeviceProfile("test", gemm_gflop_s=100.0, read_gb_s=10.0, memory_bytes=1 << 30)
HANDING_OVER = PlacementOptions("least_loaded")  # prompts so short would be computed in place
WAITING = AdmissionOptions()  # who finds no place waits in the scheduler's queue
ROOMY = BatchLimits(max_num_seqs=64, max_num_batched_tokens=64)  # long prompts come in several chunks


def tiny_llama(vocab_size: int) -> PreTrainedConfig:
    """A Llama of three layers with grouped-query attention."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.3,  # so wide that the likeliest token is so by far more than rounding
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


class TinyCheckpoint:
    """A model of random weights, and the answers that ``transformers`` gives with it."""

    def __init__(
        self, folder: Path, make_config: Callable[[int], PreTrainedConfig] = tiny_llama, dtype: str = "float32"
    ) -> None:
        """Writes the checkpoint into ``folder``; its vocabulary is the tokenizer's.

        Weights and KV are in ``dtype``; the answers are always those of float32.
        """
        torch.set_num_threads(1)
        self.path = folder
        self.tokenizer = Tokenizer(tiny_backend())
        save_model(folder, make_config(self.tokenizer.vocab_size), getattr(torch, dtype))
        config = load_config(folder)
        check_architecture(folder, config, [])
        sizes = read_sizes(folder, config)
        self.spec = KVCacheSpec(sizes.num_layers, sizes.num_kv_heads, sizes.head_size, BLOCK_SIZE, dtype)
        self.max_model_len = sizes.max_position_embeddings
        self._reference = load_reference(folder)
        self._answers: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    def save_tokenizer(self) -> None:
        """Makes the folder one that the real command can serve."""
        tiny_backend().save(str(self.path / "tokenizer.json"))
        (self.path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def prompt(self, num_tokens: int, seed: int = 0) -> tuple[int, ...]:
        """Random tokens; another seed gives another prompt of the same length."""
        rng = random.Random(1000 * seed + num_tokens)
        return tuple(rng.randrange(1, self.vocab_size) for _ in range(num_tokens))

    def greedy(self, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        """What ``transformers`` generates."""
        if (prompt, num_tokens) not in self._answers:
            tokens = torch.tensor([prompt])
            generated = self._reference.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_tokens, do_sample=False
            )
            self._answers[prompt, num_tokens] = tuple(generated[0, len(prompt) :].tolist())
        return self._answers[prompt, num_tokens]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """What ``transformers`` computes after every token: ``[tokens, vocabulary]``."""
        logits: torch.Tensor = self._reference(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return logits

    @torch.inference_mode()
    def sampled(self, prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
        """What our sampler draws from the logits of ``transformers``, computed from the start for each token."""
        tokens = list(prompt)
        for _ in range(sampling.max_tokens):
            logits = self._reference(torch.tensor([tokens]), use_cache=False).logits[0, -1:]
            tokens += sample(logits, [sampling], [len(tokens)])
        return tuple(tokens[len(prompt) :])


def greedily(max_tokens: int, stop_token_ids: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop_token_ids)


class HookedRunner(ModelRunner):
    """The real runner; a test may watch, hold or fail its steps. The hook runs in the step's thread."""

    before_step: Callable[[StepPlan], None] | None = None
    num_steps_ahead = 0  # that began before the one before them was booked

    def execute(
        self, plan: StepPlan, progress: StepProgress | None = None, inputs: PreparedInputs | None = None
    ) -> StepOutput:
        self.num_steps_ahead += inputs is not None
        if self.before_step is not None:
            self.before_step(plan)
        return super().execute(plan, progress, inputs)


class StepGate:
    """Holds the step's thread before the first step that ``matches``, until opened."""

    def __init__(self, matches: Callable[[StepPlan], bool]) -> None:
        self._matches = matches
        self._held = threading.Event()
        self._opened = threading.Event()

    def __call__(self, plan: StepPlan) -> None:
        if not self._opened.is_set() and self._matches(plan):
            self._held.set()
            self._opened.wait(30)

    def open(self) -> None:
        self._opened.set()

    async def holding(self) -> None:
        """Returns when a step is held."""
        await until(self._held.is_set, "a step that the gate holds")


class TransferGate:
    """Holds incoming handoffs after so many chunks of each were written, until opened."""

    def __init__(self, after_chunks: int) -> None:
        self.num_held = 0
        self._after_chunks = after_chunks
        self._opened = asyncio.Event()
        self._holds_more = True

    def open(self) -> None:
        self._opened.set()

    def open_for_others(self) -> None:
        """Those that are held stay so."""
        self._holds_more = False

    async def holding(self) -> None:
        await until(lambda: self.num_held > 0, "a handoff that the gate holds")

    async def pass_through(self, messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
        num_chunks = 0
        async for message in messages:
            if num_chunks == self._after_chunks and self._holds_more and not self._opened.is_set():
                self.num_held += 1
                await self._opened.wait()
            num_chunks += isinstance(message, Chunk)
            yield message


class InProcessScheduler:
    """A ``SchedulerPort``: the real controller, without the Ray actor around it. Remembers what it placed.

    Without ``admission`` it places everything at once, and requests wait on the workers.
    """

    def __init__(self, options: PlacementOptions, admission: AdmissionOptions | None = None) -> None:
        self.placements: list[Placement] = []
        self.answers = asyncio.Event()  # cleared: calls get no answer until it is set again
        self.answers.set()
        self._controller = ClusterController(options=options)
        self._delivery = Delivery(AdmissionControl(self._controller, admission)) if admission is not None else None

    async def handle(self, events: Sequence[Event], asker: str = "") -> list[list[Command]]:
        now = time.monotonic()
        if self._delivery is not None:
            commands = self._delivery.handle(events, asker, now)
        else:
            commands = [self._controller.handle(event, now) for event in events]
        self.placements += [
            command.placement for answer in commands for command in answer if isinstance(command, PlaceRequest)
        ]
        await self.answers.wait()
        return commands

    async def snapshot(self) -> ClusterSnapshot:
        return self._controller.snapshot()

    @property
    def requests_in_flight(self) -> int:
        return sum(worker.requests_in_flight for worker in self._controller.snapshot().workers)


@dataclass(frozen=True, slots=True)
class Completion:
    """A sequence as its client saw it."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None
    num_cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(slots=True)
class LocalCluster:
    checkpoint: TinyCheckpoint
    scheduler: InProcessScheduler
    engine: AsyncEngine
    workers: dict[str, Worker]  # the live ones
    runners: dict[str, HookedRunner]
    channels: ChannelPool
    ranks: list[ThreadRanks] = field(default_factory=list)  # followers of tensor-parallel workers
    _gates: list[StepGate] = field(default_factory=list)

    def stub(self, worker_id: str) -> worker_pb2_grpc.WorkerStub:
        """For calls past the gateway."""
        return self.channels(self.workers[worker_id].address).worker

    def channel(self, worker_id: str) -> grpc.aio.Channel:
        return self.channels(self.workers[worker_id].address).channel

    async def complete(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        stop: Sequence[str] = (),
        cache_salt: bytes = b"",
        origin: Origin = SOMEBODY,
    ) -> Completion:
        """Runs one sequence to its end; fails when the stream has none."""
        deltas: list[TextDelta] = []
        async with aclosing(self.engine.generate(prompt, sampling, stop, cache_salt, origin)) as stream:
            async for delta in stream:
                assert not deltas or deltas[-1].finish_reason is None, "a piece came after the end"
                deltas.append(delta)
        reason = deltas[-1].finish_reason
        assert reason is not None, "the stream ended without a finish reason"
        token_ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
        logprobs = tuple(each.logprobs for delta in deltas for each in delta.logprobs)
        of_prompt = tuple(each for delta in deltas for each in delta.prompt_logprobs)
        text = "".join(delta.text for delta in deltas)
        (num_cached_tokens,) = [delta.num_cached_tokens for delta in deltas if delta.num_cached_tokens is not None]
        return Completion(token_ids, text, reason, deltas[-1].stop_reason, num_cached_tokens, logprobs, of_prompt)

    def load(self, worker_id: str) -> WorkerLoad:
        return self.workers[worker_id].load()

    def failures(self, worker_id: str) -> dict[str, int]:
        """Handoffs that a decode worker has refused: fault → count."""
        return dict(self.load(worker_id).transfer_failures)

    async def check_greedy(self, prompt: tuple[int, ...], num_tokens: int, cache_salt: bytes = b"") -> int:
        """Runs one sequence and compares it with the reference. Returns how many prompt tokens were cached."""
        completion = await self.complete(prompt, greedily(num_tokens), cache_salt=cache_salt)
        assert completion.token_ids == self.checkpoint.greedy(prompt, num_tokens)
        assert completion.text == self.checkpoint.tokenizer.decode(completion.token_ids)
        assert completion.finish_reason is FinishReason.LENGTH
        return completion.num_cached_tokens

    def hold_steps(self, worker_id: str, matches: Callable[[StepPlan], bool]) -> StepGate:
        gate = StepGate(matches)
        self.runners[worker_id].before_step = gate
        self._gates.append(gate)
        return gate

    def hold_transfers(self, worker_id: str, after_chunks: int) -> TransferGate:
        """Holds what a decode worker receives from now on."""
        gate = TransferGate(after_chunks)
        receiver = self.workers[worker_id].transfers
        receive = receiver._receive
        receiver._receive = lambda messages: receive(gate.pass_through(messages))  # type: ignore[method-assign]
        return gate

    def keeps(self, request_id: str) -> bool:
        """Whether any live worker still has anything of a request."""
        return any(
            worker.step_loop.batcher.find(request_id) is not None
            or worker.manager.block_table(request_id)
            or any(lease.request_id == request_id for lease in worker.manager.leases)
            for worker in self.workers.values()
        )

    async def kill(self, worker_id: str) -> None:
        """The worker's calls, both ways, break off in the middle, and its port is closed. Nobody is told."""
        worker = self.workers.pop(worker_id)
        assert worker._server is not None
        await worker._channels.close()
        await worker._server.stop(None)
        await self._stop(worker)

    async def close(self) -> None:
        for worker in self.workers.values():
            await self._stop(worker)

    async def _stop(self, worker: Worker) -> None:
        for gate in self._gates:  # a held step would hold the event loop when its thread is joined
            gate.open()
        await worker.stop()


@asynccontextmanager
async def local_cluster(
    checkpoint: TinyCheckpoint,
    *,
    prefill: int = 0,
    decode: int = 0,
    colocated: int = 0,
    num_blocks: int = 256,
    limits: BatchLimits = ROOMY,
    lease_ttl_s: float = 30.0,
    tensor_parallel_sizes: Mapping[WorkerRole, int] | None = None,
    prefix_caching: bool = True,
    specs: Mapping[WorkerRole, KVCacheSpec] | None = None,
    tls: TlsFolder | None = None,
    placement: PlacementOptions = HANDING_OVER,
    admission: AdmissionOptions | None = None,
    **options_of_all: Any,
) -> AsyncIterator[LocalCluster]:
    """Starts workers named ``prefill-0``, ``decode-0`` and so on; at the end nothing may be left on a live one."""
    scheduler = InProcessScheduler(placement, admission)
    client = SchedulerClient(scheduler, placement)
    served = ServedModel((MODEL_NAME,), checkpoint.max_model_len, 0, (), checkpoint.vocab_size)
    engine = AsyncEngine(served, checkpoint.tokenizer, client, tls)
    cluster = LocalCluster(checkpoint, scheduler, engine, {}, {}, ChannelPool(tls))
    counts = {WorkerRole.PREFILL: prefill, WorkerRole.DECODE: decode, WorkerRole.COLOCATED: colocated}
    try:
        for role in (role for role, count in counts.items() for _ in range(count)):
            worker_id = f"{role.value}-{sum(name.startswith(role.value) for name in cluster.workers)}"
            options = worker_options(checkpoint, worker_id, role, num_blocks, limits, lease_ttl_s)
            size = (tensor_parallel_sizes or {}).get(role, 1)
            spec = (specs or {}).get(role, options.spec)
            own = replace(
                options,
                tensor_parallel_size=size,
                prefix_caching=prefix_caching,
                spec=spec,
                tls_folder=None if tls is None else tls.path,
                **options_of_all,
            )
            await _start_worker(cluster, own)
        await client.start()
        yield cluster
        await check_no_leaks(cluster.workers.values())
        await until(lambda: scheduler.requests_in_flight == 0, "the controller to hear that all requests ended")
    finally:
        await client.stop()
        await cluster.engine.close()
        await cluster.channels.close()
        await cluster.close()
        for ranks in cluster.ranks:
            ranks.join()


def worker_options(
    checkpoint: TinyCheckpoint,
    worker_id: str,
    role: WorkerRole,
    num_blocks: int,
    limits: BatchLimits,
    lease_ttl_s: float,
) -> WorkerOptions:
    return WorkerOptions(
        worker_id=worker_id,
        role=role,
        model_path=str(checkpoint.path),
        model_name=MODEL_NAME,
        spec=checkpoint.spec,
        shape=make_shape(checkpoint.spec),
        num_blocks=num_blocks,
        max_model_len=checkpoint.max_model_len,
        vocab_size=checkpoint.vocab_size,
        dtype="float32",
        limits=limits,
        lease_ttl_s=lease_ttl_s,
    )


async def _start_worker(cluster: LocalCluster, options: WorkerOptions) -> None:
    if options.tensor_parallel_size > 1:
        ranks = ThreadRanks(options)
        cluster.ranks.append(ranks)
        group = LeaderGroup(options, ranks.start)
        runner = HookedRunner(GroupModel(group, load_step_model(options, group.rank)), group.shards[0])
        group.await_ready()
        worker = Worker(options, runner, group.storage, group)
    else:
        storage = PagedStorage(options.spec, options.given_num_blocks)
        runner = HookedRunner(load_step_model(options), storage)
        worker = Worker(options, runner, storage)
    await worker.start()
    cluster.workers[options.worker_id] = worker
    cluster.runners[options.worker_id] = runner
    await cluster.scheduler.handle([WorkerRegistered(worker.info(1, DEVICE))])
