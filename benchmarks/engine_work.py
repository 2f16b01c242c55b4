"""One worker's own step loop on made-up requests, and where the time of each step goes.

The batcher, the runner and the loop are those that serve; they are only watched. A prompt runs as in a prefill
worker, chunked. Decoding sequences start as in a decode worker, with the KV of their prompt in place: what that
KV holds changes no timing, so it is noise and not computed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, Literal

import psutil
import torch
from torch import nn

from kvcache.errors import ResourceError
from kvcache.manager import KVCacheManager
from kvcache.rows import encode_rows
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.batching import Batcher, BatchLimits
from scheduler.request import Request, SamplingParams
from scheduler.step_plan import StepOutput, StepPlan
from workers.model.checkpoint import CheckpointInfo
from workers.model.fused_decoder import FusedDecoder
from workers.model.runner import ModelRunner, choose_step_model
from workers.model.step_model import PreparedInputs, StepLogits, StepModel
from workers.model.transformers_model import TransformersModel, load_model
from workers.native.library import load_library
from workers.step_loop import StepLoop, TokenStream
from workers.step_progress import StepProgress

BLOCK_SIZE = 16  # what `twinpool serve` uses unless told otherwise
MAX_BATCHED_TOKENS = 512
WARM_UP_STEPS = 2
DECODE_STEPS = 64
SEED = 0
TOP_P = 0.9
AUTO = "auto"
TRANSFORMERS = "transformers"
FUSED = "fused"
INT8 = "int8"
QUANTIZED = (INT8, "int4")  # auto, with quantized weights
STEP_MODELS = (AUTO, TRANSFORMERS)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What is loaded, and how."""

    checkpoint: CheckpointInfo
    num_threads: int
    step_model: str  # of STEP_MODELS or QUANTIZED
    kv_cache_dtype: str = AUTO  # the model's

    @property
    def spec(self) -> KVCacheSpec:
        known = self.checkpoint
        dtype = known.dtype if self.kv_cache_dtype == AUTO else self.kv_cache_dtype
        return KVCacheSpec(known.num_layers, known.num_kv_heads, known.head_size, BLOCK_SIZE, dtype)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step by piece, from the end of the step before. Together they are the step."""

    scheduling: float  # until the step's thread begins with it: booking, planning, whatever was not done beside a step
    build_inputs: float  # and whatever else the step model does around the model's own call
    model: float
    sampling: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


PIECES = tuple(field.name for field in fields(StepTimes))


def fractions_of_step(steps: Sequence[StepTimes]) -> dict[str, float]:
    """Each piece's share of the time of all ``steps``."""
    total = sum(step.total for step in steps)
    return {piece: sum(getattr(step, piece) for step in steps) / total for piece in PIECES}


def seconds_of(steps: Sequence[StepTimes]) -> float:
    return sum(step.total for step in steps)


def median_step(steps: Sequence[StepTimes]) -> StepTimes:
    """The median of each piece by itself."""
    return StepTimes(**{piece: median(getattr(step, piece) for step in steps) for piece in PIECES})


class StepClock:
    """Adds up the pieces of the step under way, in the step's thread."""

    def __init__(self) -> None:
        self.steps: list[StepTimes] = []
        self._spent: dict[str, float] = {}
        self._ended_s = 0.0  # the step before

    def start(self) -> None:
        """Nothing runs; from now on time belongs to the step that comes."""
        self.steps.clear()
        self._spent.clear()
        self._ended_s = time.perf_counter()

    def end_step(self) -> None:
        now_s = time.perf_counter()
        self.steps.append(split_step(self._spent, now_s - self._ended_s))
        self._spent.clear()
        self._ended_s = now_s

    @contextmanager
    def piece(self, name: Literal["execute", "logits", "model"]) -> Iterator[None]:
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - started_s


def split_step(spent: Mapping[str, float], total: float) -> StepTimes:
    """From calls that hold each other to pieces that do not::

    total      ├ scheduling ┼────────── execute ─────────┤
                            ├────── logits ─────┤sampling
                                  ├── model ──┤
    """
    return StepTimes(
        scheduling=total - spent["execute"],
        build_inputs=spent["logits"] - spent["model"],
        model=spent["model"],
        sampling=spent["execute"] - spent["logits"],
    )


class TimedRunner(ModelRunner):
    """The runner that serves."""

    def __init__(self, model: StepModel, storage: PagedStorage, clock: StepClock) -> None:
        super().__init__(model, storage)
        self._clock = clock

    def execute(
        self, plan: StepPlan, progress: StepProgress | None = None, inputs: PreparedInputs | None = None
    ) -> StepOutput:
        with self._clock.piece("execute"):
            output = super().execute(plan, progress, inputs)
        self._clock.end_step()
        return output

    def compute(self, plan: StepPlan, progress: StepProgress | None, inputs: PreparedInputs | None) -> StepLogits:
        with self._clock.piece("logits"):
            return super().compute(plan, progress, inputs)


@contextmanager
def wrapped(owner: object, name: str, around: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Until the end, every call of ``owner.name`` happens inside a fresh ``around()``."""
    call = getattr(owner, name)
    is_own = name in vars(owner)

    def call_inside(*args: Any, **kwargs: Any) -> Any:
        with around():
            return call(*args, **kwargs)

    setattr(owner, name, call_inside)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, call)
        else:
            delattr(owner, name)


class Engine:
    """A worker without its services. ``module`` is the loaded model where transformers runs it, else None."""

    def __init__(
        self, settings: EngineSettings, step_model: StepModel, module: nn.Module | None, num_blocks: int, max_seqs: int
    ) -> None:
        self.settings = settings
        self.step_model = step_model
        self.module = module
        self.clock = StepClock()
        # Without the prefix cache: every round has the same prompts, and shall compute them.
        self.manager = KVCacheManager(settings.spec, num_blocks, prefix_caching=False)
        self.storage = allocate_storage(settings.spec, num_blocks)
        limits = BatchLimits(max_num_seqs=max_seqs, max_num_batched_tokens=MAX_BATCHED_TOKENS)
        self.step_loop = StepLoop(Batcher(self.manager, limits), TimedRunner(step_model, self.storage, self.clock))
        self.step_loop.on_reserved = self._attach
        self.stepping: asyncio.Task[None] | None = None

    @property
    def step_model_name(self) -> str:
        return FUSED if self.module is None else TRANSFORMERS

    async def prefill(self, num_tokens: int) -> list[StepTimes]:
        """The steps of one prompt, up to its first token."""
        return await self._run([self._request(0, num_tokens, num_new_tokens=1, has_kv=False)])

    async def decode(
        self, batch: int, context: int, num_steps: int = DECODE_STEPS, is_sampled: bool = False
    ) -> list[StepTimes]:
        """``num_steps`` steps, after a few that do not count, of sequences with ``context`` prompt tokens each.

        ``is_sampled``: their tokens are drawn under top_p, else the likeliest taken.
        """
        # The first new token comes with the KV, so as many steps as tokens follow after it.
        new_tokens = 1 + WARM_UP_STEPS + num_steps
        sampling = SamplingParams(new_tokens, temperature=1.0, top_p=TOP_P, seed=SEED) if is_sampled else None
        requests = [self._request(index, context, new_tokens, has_kv=True, sampling=sampling) for index in range(batch)]
        steps = await self._run(requests)
        assert len(steps) == WARM_UP_STEPS + num_steps, "the sequences did not decode together"
        return steps[WARM_UP_STEPS:]

    def _request(
        self,
        index: int,
        num_prompt_tokens: int,
        num_new_tokens: int,
        *,
        has_kv: bool,
        sampling: SamplingParams | None = None,
    ) -> Request:
        rng = random.Random(SEED + index)
        vocab_size = self.settings.checkpoint.vocab_size
        prompt = tuple(rng.randrange(vocab_size) for _ in range(num_prompt_tokens))
        sampling = sampling or SamplingParams(max_tokens=num_new_tokens, temperature=0.0)
        return Request(f"request-{index}", prompt, sampling, remote_prefill=has_kv)

    def _attach(self, request: Request) -> None:
        first_token_id = request.prompt_token_ids[0]
        self.step_loop.deliver(self.step_loop.batcher.attach(request.request_id, first_token_id))
        self.step_loop.wake()  # as KV that has come

    async def _run(self, requests: Sequence[Request]) -> list[StepTimes]:
        """Computes sequences that start together; every block is free before and after."""
        assert self.stepping is not None, "the engine was not opened by open_engine"
        self.clock.start()
        streams = [self.step_loop.submit(request) for request in requests]
        reading = asyncio.gather(*(_read(stream) for stream in streams))
        try:
            either: set[asyncio.Future[Any]] = {reading, self.stepping}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self.stepping.done():
                self.stepping.result()
            await reading
        finally:
            for request in requests:
                self.step_loop.release(request.request_id)
        self.manager.check_idle()
        return list(self.clock.steps)


async def _read(stream: TokenStream) -> None:
    async for _ in stream:
        pass


@asynccontextmanager
async def open_engine(settings: EngineSettings, num_blocks: int, max_seqs: int) -> AsyncIterator[Engine]:
    """Loads the model as a worker does, takes the KV cache, and runs the step loop until the end.

    Raises:
        ModelError: the checkpoint cannot be loaded.
        ResourceError: not enough memory.
    """
    torch.set_num_threads(settings.num_threads)
    checkpoint = settings.checkpoint
    module = load_model(checkpoint.path, checkpoint.dtype)
    if settings.step_model == TRANSFORMERS:
        step_model: StepModel = TransformersModel(module)
    else:
        max_model_len = checkpoint.max_position_embeddings
        quantization = settings.step_model if settings.step_model in QUANTIZED else "none"
        step_model = choose_step_model(
            module,
            settings.spec,
            max_model_len,
            settings.num_threads,
            quantization,
            reload=lambda: load_model(checkpoint.path, checkpoint.dtype),
        )
    is_fused = isinstance(step_model, FusedDecoder)
    engine = Engine(settings, step_model, None if is_fused else module, num_blocks, max_seqs)
    del module  # the fused decoder has copies of the weights; a worker drops the model too
    owner, name = (load_library(), "twinpool_step") if is_fused else (engine.module, "forward")
    with wrapped(owner, name, lambda: engine.clock.piece("model")):
        engine.stepping = asyncio.create_task(engine.step_loop.run())
        try:
            yield engine
        finally:
            engine.stepping.cancel()
            await asyncio.wait({engine.stepping})
            engine.step_loop.close()


def num_blocks_needed(prefill_tokens: Sequence[int], batches: Sequence[int], contexts: Sequence[int]) -> int:
    """KV blocks for the largest of the cases; they run one after the other."""
    longest_decode = max(contexts) + 1 + WARM_UP_STEPS + DECODE_STEPS
    for_decode = max(batches) * -(-longest_decode // BLOCK_SIZE)
    return max(for_decode, -(-(max(prefill_tokens) + 1) // BLOCK_SIZE))


def allocate_storage(spec: KVCacheSpec, num_blocks: int) -> PagedStorage:
    """Filled with noise: memory never written is one page of zeros, read from a cache and not from memory.

    Raises:
        ResourceError: there is not enough.
    """
    needed, available = num_blocks * spec.block_bytes, psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(f"The KV cache needs {needed >> 20} MiB; {available >> 20} MiB of memory are available.")
    storage = PagedStorage(spec, num_blocks)
    generator = torch.Generator().manual_seed(SEED)
    for layer in storage.layers:
        noise = torch.randn((*layer.shape[1:-1], spec.head_size), generator=generator)
        layer.copy_(encode_rows(noise, layer.dtype).expand_as(layer))
    return storage
