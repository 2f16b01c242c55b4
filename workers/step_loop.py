"""The worker's engine: plan a step, run it, hand out the tokens; again as long as there is work.

While a step of decoding sequences runs, the next one is planned and its inputs are made (``workers.lookahead``). If
nothing changed meanwhile, the step's thread goes on with it as soon as it has sampled, and the event loop books and
hands out tokens beside it: what is left between two steps is to choose tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import ChainMap
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvcache.errors import RequestError, TwinpoolError
from scheduler.batching import Batcher
from scheduler.request import Request
from scheduler.step_plan import SampledToken, StepOutput, StepPlan
from workers.lookahead import Lookahead, PreparedStep, with_tokens
from workers.model.runner import ModelRunner
from workers.model.step_model import PreparedInputs
from workers.rates import Rate
from workers.step_progress import StepProgress
from workers.step_times import StepLedger

MEASURED_PROMPT_TOKENS = 16  # steps with fewer say more of decoding
logger = logging.getLogger(__name__)


class StepFailedError(TwinpoolError):
    """The model could not compute this sequence."""


@dataclass(frozen=True, slots=True)
class StepResult:
    output: StepOutput
    failures: dict[str, TwinpoolError]  # request id → what its client is told
    following: StepPlan | None = None  # which the step's thread runs already


@dataclass(slots=True, eq=False)
class TokenStream:
    """The tokens of one sequence as they come. Read by one task."""

    request: Request
    begun_s: float | None = None  # monotonic: when the first step with this sequence began
    _events: asyncio.Queue[SampledToken | TwinpoolError] = field(default_factory=asyncio.Queue)

    def put(self, event: SampledToken | TwinpoolError) -> None:
        self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[SampledToken]:
        """Ends after the token with a finish reason; a prefill-only sequence has just one token.

        Raises:
            TwinpoolError: what ended the sequence early.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, TwinpoolError):
                raise event
            yield event
            if event.finish_reason is not None or event.request.prefill_only:
                return


class KVListener(Protocol):
    """Hears how far the KV of a step is. Called on the event loop."""

    def begin_step(self, plan: StepPlan) -> bool:
        """A step is about to run; False: nothing in it is of interest, so layers need not be told."""
        ...

    def layers_computed(self, num_layers: int) -> None:
        """The KV of the first ``num_layers`` layers is in the cache. May come less often than once a layer."""
        ...

    def end_step(self, failed: Container[str]) -> None:
        """The step has ended: all its KV is in the cache, but that of the sequences that ``failed``."""
        ...


class StepLoop:
    """Owns the batcher and drives the runner. Everything but the model's step runs on one event loop.

    While a step computes in its thread, the event loop goes on receiving requests and KV; it does not touch
    the blocks of the running step, and the step touches no others.
    """

    def __init__(self, batcher: Batcher, runner: ModelRunner) -> None:
        self.batcher = batcher
        self.kv_listener: KVListener | None = None  # the prefill role sends KV on as it comes
        self.prompt_tokens_computed = 0
        self.generation_tokens = 0
        self.times = StepLedger()
        self.prefill_rate = Rate()  # prompt tokens per second
        self.bring_back: Callable[[Request], Awaitable[None]] | None = None  # of KV tiers
        self.on_reserved: Callable[[Request], None] | None = None  # the decode role starts handoffs here
        self._runner = runner
        self._streams: dict[str, TokenStream] = {}
        self._unbegun: dict[str, TokenStream] = {}  # those of them of which no step had anything yet
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model-step")
        self._progress = StepProgress(self._tell_layers)
        self._lookahead = Lookahead()
        self._has_changed = False  # since the last plan

    async def prepare(self, request: Request) -> None:
        """Call before ``submit``, for a sequence whose prompt is computed here."""
        if self.bring_back is not None:
            await self.bring_back(request)

    def submit(self, request: Request) -> TokenStream:
        """Queues a sequence. The caller calls ``release`` in the end, whatever happens.

        Raises:
            RequestError, OverloadedError: as ``Batcher.add``.
        """
        self.batcher.add(request)
        stream = TokenStream(request)
        self._streams[request.request_id] = self._unbegun[request.request_id] = stream
        if request.remote_prefill:
            asyncio.get_running_loop().call_soon(self._begin_handoff)  # the caller has yet to note what it needs
        else:
            self.wake()
        return stream

    def release(self, request_id: str) -> None:
        """Ends a sequence if it has not ended, and forgets its stream."""
        self._streams.pop(request_id, None)
        self._unbegun.pop(request_id, None)
        changes = self.batcher.find(request_id) is not None or self.batcher.num_waiting > 0
        self.batcher.abort(request_id)
        if changes:
            self.wake()
        else:
            self._work.set()  # blocks may have come free, which those that run have no use for

    def fail(self, request_id: str, error: TwinpoolError) -> None:
        """Ends a sequence early; its reader gets ``error``."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put(error)
        self.batcher.abort(request_id)
        self.wake()

    def deliver(self, output: SampledToken) -> None:
        self.generation_tokens += not output.request.prefill_only  # counted where it is sent on to the client
        stream = self._streams.get(output.request.request_id)
        if stream is not None:
            stream.put(output)

    def wake(self) -> None:
        """Something changed: blocks came free, a request joined, KV arrived."""
        self._has_changed = True
        self._lookahead.withdraw()
        self._work.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            self._work.clear()
            self._has_changed = False
            started_s = time.monotonic()
            self._start_handoffs()
            plan = self.batcher.plan(self.prefill_rate.per_second)
            if plan is None:
                await self._work.wait()
            else:
                await self._compute(plan, started_s)

    def _begin_handoff(self) -> None:
        """At once where there is room: what another worker computes need not wait for the step that runs here, nor
        does it change that step's successor."""
        self._start_handoffs()
        if self.batcher.num_waiting:
            self.wake()

    def _start_handoffs(self) -> None:
        if self.on_reserved is not None:
            for request in self.batcher.reserve_handoffs():
                self.on_reserved(request)

    def _note_begun(self, plan: StepPlan, now: float) -> None:
        for chunk in plan.chunks if self._unbegun else ():
            if (stream := self._unbegun.pop(chunk.request_id, None)) is not None:
                stream.begun_s = now

    def _note_times(self, plan: StepPlan, seconds: float) -> None:
        self.times.add(plan.chunks, seconds)
        num_prompt_tokens = sum(chunk.num_prompt_tokens for chunk in plan.chunks)
        if num_prompt_tokens >= MEASURED_PROMPT_TOKENS:
            self.prefill_rate.add(num_prompt_tokens, seconds)

    def close(self) -> None:
        self._lookahead.withdraw()
        self._thread.shutdown(wait=True)
        self._progress.close()

    async def _compute(self, plan: StepPlan, started_s: float) -> None:
        """One step, and those that follow it without a pause."""
        self._note_begun(plan, started_s)
        listens = self.kv_listener is not None and self.kv_listener.begin_step(plan)
        self._progress.begin()
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[StepResult | None] = asyncio.Queue()

        def tell(result: StepResult | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, result)

        running = loop.run_in_executor(self._thread, self._run_steps, plan, self._progress if listens else None, tell)
        running.add_done_callback(lambda _: told.put_nowait(None))  # so that nobody waits for a thread that failed
        await told.get()
        if not listens:
            self._look_ahead(plan)
        while (result := await told.get()) is not None:
            self._book(plan, result)
            booked_s = time.monotonic()
            self._note_times(plan, booked_s - started_s)
            if result.following is None:
                self._lookahead.withdraw()  # what came too late
                return
            plan, started_s = result.following, booked_s
            self._look_ahead(plan)
        running.result()

    def _look_ahead(self, plan: StepPlan) -> None:
        """Offers what follows ``plan``, which has just begun."""
        if self._has_changed:
            return
        following = self.batcher.plan_ahead(plan)
        inputs = self._runner.prepare(following) if following is not None else None
        if following is not None and inputs is not None:
            self._lookahead.offer(PreparedStep(following, inputs))

    def _book(self, plan: StepPlan, result: StepResult) -> None:
        if self.kv_listener is not None:
            self.kv_listener.end_step(result.failures)
        for output in self.batcher.apply(plan, result.output, result.failures, result.following):
            self.deliver(output)
        for request_id, error in result.failures.items():
            self.fail(request_id, error)
        self.prompt_tokens_computed += sum(chunk.num_prompt_tokens for chunk in plan.chunks)

    def _tell_layers(self, num_layers: int) -> None:
        if self.kv_listener is not None:
            self.kv_listener.layers_computed(num_layers)

    def _run_steps(
        self, plan: StepPlan, progress: StepProgress | None, tell: Callable[[StepResult | None], None]
    ) -> None:
        """Runs in the step's thread. Tells None when it begins, so that the event loop, which has the interpreter until
        the step computes, prepares the next one then; afterwards each result."""
        tell(None)
        result = self._execute(plan, progress)
        while not result.failures and (step := self._lookahead.take(result.output)) is not None:
            tell(replace(result, following=step.plan))
            result = self._execute(step.plan, None, step.inputs, result.output)
        tell(result)

    def _execute(
        self,
        plan: StepPlan,
        progress: StepProgress | None,
        inputs: PreparedInputs | None = None,
        before: StepOutput | None = None,
    ) -> StepResult:
        """A step that raises is run again sequence by sequence, so that only the sequences that cannot be computed
        fail. ``before`` has the tokens of a step that was planned ahead."""
        try:
            return StepResult(self._runner.execute(plan, progress, inputs), {})
        except Exception:
            logger.exception("A step of %d sequences failed; running them one by one.", len(plan.chunks))
        outputs: list[StepOutput] = []
        failures: dict[str, TwinpoolError] = {}
        for chunk in (plan if before is None else with_tokens(plan, before)).chunks:
            try:
                outputs.append(self._runner.execute(StepPlan((chunk,))))
            except RequestError as error:
                failures[chunk.request_id] = error
            except Exception as error:  # noqa: BLE001  a sequence's boundary; its client is told
                failures[chunk.request_id] = StepFailedError(f"{type(error).__name__}: {error}")
        return StepResult(_merged(outputs), failures)


def _merged(outputs: Sequence[StepOutput]) -> StepOutput:
    return StepOutput(
        tokens=dict(ChainMap(*(dict(output.tokens) for output in outputs))),
        logprobs=dict(ChainMap(*(dict(output.logprobs) for output in outputs))),
        prompt_logprobs=dict(ChainMap(*(dict(output.prompt_logprobs) for output in outputs))),
    )
