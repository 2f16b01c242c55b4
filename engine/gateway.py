"""One sequence from the user's side: placed, streamed, turned into text, and carried on when a worker is lost."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import grpc

from engine.outputs import SOMEBODY, Interruption, Origin, QueuePlace, ServedModel, TextDelta
from engine.scheduler_client import SchedulerClient
from engine.text_assembler import TextAssembler, TokenBatch
from engine.tickets import Ticket, Tickets
from engine.tokenizer import Tokenizer
from kvcache.errors import InvariantError, MovedError, UnavailableError, WorkerLostError
from scheduler.cache_index import hashes_of_prompt
from scheduler.events import PrefillDone, RequestArrived, RequestEnded
from scheduler.request import FinishReason, SamplingParams, TokenLogprobs, check_sequence
from scheduler.types import ClusterSnapshot, Placement, PrefixHashes
from scheduler.urgency import Urgency
from workers import worker_pb2 as pb
from workers.channels import ChannelPool
from workers.messages import error_from_rpc, logprobs_from_wire, sampling_to_wire, urgency_to_wire
from workers.stages import Stage, seconds_by_stage
from workers.tls import TlsFolder

# A sequence that has failed on this many is given up. Where one handoff in twenty fails, 200 sequences all complete but
# for one run in 16,000; with three it would be one in 40. With more, a sequence that kills its worker would kill more.
MAX_PLACEMENTS = 5
ENDING = "The server is shutting down."
logger = logging.getLogger(__name__)


class AsyncEngine:
    """Implements ``engine.outputs.TextEngine`` over real workers. One event loop owns it.

    It alone knows which tokens a client was given. When a worker is lost, the sequence is placed again with
    prompt and delivered tokens as its prompt, and goes on at the next token. The draw of a token depends on
    (seed, position) and its logits only, so it is the token that the lost worker would have sent, as far as
    computing the delivered tokens' KV as a prompt gives the same logits: to rounding.
    """

    def __init__(
        self,
        model: ServedModel,
        tokenizer: Tokenizer,
        scheduler: SchedulerClient,
        tls: TlsFolder | None = None,
        on_placed: Callable[[float], None] = lambda _seconds: None,
        on_placed_again: Callable[[Interruption], None] = lambda _reason: None,
        on_stages: Callable[[dict[Stage, float]], None] = lambda _seconds: None,
    ) -> None:
        """``on_placed`` hears how many seconds each sequence has waited for its workers, ``on_placed_again`` why one is
        to go on elsewhere, ``on_stages`` how many it spent in each stage on the workers where it has ended."""
        self._model = model
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._on_placed = on_placed
        self._on_placed_again = on_placed_again
        self._on_stages = on_stages
        self._tickets = Tickets()
        self._channels = ChannelPool(tls)
        self._calls: set[grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.TokenEvent]] = set()
        self._is_ending = False

    @property
    def model(self) -> ServedModel:
        return self._model

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def cluster(self) -> ClusterSnapshot:
        return self._scheduler.cluster

    @property
    def ready(self) -> bool:
        return self._scheduler.is_ready

    def end_requests(self) -> None:
        """Every running sequence, and every one that still comes, fails with ``UnavailableError``."""
        self._is_ending = True
        for call in self._calls:
            call.cancel()

    def _ended_the_call(self) -> bool:
        """Whether a cancellation comes from ``end_requests`` and not from whoever cancelled the running task."""
        task = asyncio.current_task()
        return self._is_ending and task is not None and not task.cancelling()

    async def close(self) -> None:
        await self._channels.close()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        stop: Sequence[str] = (),
        cache_salt: bytes = b"",
        origin: Origin = SOMEBODY,
        on_placed: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[TextDelta, None]:
        """See ``TextEngine.generate``."""
        text = TextAssembler(self._tokenizer, self._model.eos_token_ids, stop, sampling.min_tokens)
        is_first = True
        with self._tickets.held(origin) as ticket:
            tokens = self._tokens(tuple(prompt_token_ids), sampling, cache_salt, origin, ticket, on_placed)
            async with aclosing(tokens) as events:
                async for event in events:
                    delta = text.push(event)
                    if is_first:
                        delta = replace(delta, num_cached_tokens=event.num_cached_tokens)
                    is_first = False
                    yield delta
                    if delta.finish_reason is not None:
                        return

    def queue_place(self, tenant: str, ticket: str) -> QueuePlace | None:
        """See ``TextEngine.queue_place``."""
        request_ids = self._tickets.request_ids(tenant, ticket)
        if not request_ids:
            return None
        positions = [self._scheduler.position(request_id) for request_id in request_ids]
        waiting = [position for position in positions if position is not None]
        return QueuePlace(min(waiting) if len(waiting) == len(positions) else None)

    async def _tokens(
        self,
        prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams,
        cache_salt: bytes,
        origin: Origin,
        ticket: Ticket,
        on_placed: Callable[[], None],
    ) -> AsyncGenerator[TokenBatch, None]:
        """Every token exactly once, over as many placements as it takes."""
        check_sequence(
            prompt_token_ids,
            sampling,
            max_model_len=self._model.max_model_len,
            vocab_size=self._model.vocab_size,
        )
        delivered: list[int] = []
        setbacks = _Setbacks()
        while True:
            prompt = (*prompt_token_ids, *delivered)
            rest = sampling
            if delivered:
                left = sampling.max_tokens - len(delivered)
                rest = replace(sampling, max_tokens=left, prompt_logprobs=None)  # they came with the first token
            ticket.request_id = uuid.uuid4().hex
            placement = await self._place(
                RequestArrived(
                    ticket.request_id,
                    len(prompt),
                    rest.max_tokens,
                    tuple(setbacks.avoid),
                    setbacks.stay_on,
                    self._prefixes(prompt, cache_salt),
                    origin.tenant,
                    origin.urgency,
                    is_continued=bool(setbacks.avoid),
                )
            )
            on_placed()
            request = _request(placement, prompt, rest, len(delivered), cache_salt, origin.urgency)
            try:
                async with aclosing(self._run(placement, request, rest)) as events:
                    async for event in events:
                        delivered += event.token_ids
                        yield event
                return
            except UnavailableError as error:
                if self._is_ending:
                    raise UnavailableError(ENDING) from None
                setbacks.note(placement, error)
                if setbacks.num_failures == MAX_PLACEMENTS:
                    raise
                self._on_placed_again(_reason(error))
                logger.warning("A sequence is placed again after %d tokens: %s", len(delivered), error)

    async def _place(self, arrival: RequestArrived) -> Placement:
        clock = asyncio.get_running_loop().time
        began_s = clock()
        placement = await self._scheduler.place(arrival)
        self._on_placed(clock() - began_s)
        return placement

    def _prefixes(self, prompt: Sequence[int], cache_salt: bytes) -> tuple[PrefixHashes, ...]:
        """By which the scheduler finds workers that have the prompt's beginning, whatever their block size."""
        sizes = dict.fromkeys(worker.info.spec.block_size for worker in self.cluster.workers)
        return tuple(hashes_of_prompt(cache_salt, size, prompt) for size in sizes if size <= len(prompt))

    async def _run(
        self, placement: Placement, request: pb.GenerateRequest, sampling: SamplingParams
    ) -> AsyncGenerator[TokenBatch, None]:
        """Runs a sequence where it was placed, and keeps the scheduler informed."""
        num_tokens = 0
        is_finished = False
        try:
            async with aclosing(self._stream(placement, request, sampling)) as events:
                async for event in events:
                    if event.first_index == 0:
                        self._scheduler.tell(PrefillDone(placement.request_id))
                    num_tokens += len(event.token_ids)
                    is_finished = event.finish_reason is not None
                    yield event
        finally:
            self._scheduler.tell(RequestEnded(placement.request_id, num_tokens if is_finished else 0, num_tokens))

    async def _stream(
        self, placement: Placement, request: pb.GenerateRequest, sampling: SamplingParams
    ) -> AsyncGenerator[TokenBatch, None]:
        """The events of one call to a decode worker, checked for gaps and repeats."""
        if self._is_ending:
            raise UnavailableError(ENDING)
        call = self._channels(placement.decode.address).worker.Generate(request)
        num_tokens = 0
        prompt_logprobs: list[TokenLogprobs] = []
        self._calls.add(call)
        try:
            async for event in call:
                if event.first_index != num_tokens:
                    raise InvariantError(f"token {num_tokens} was expected and token {event.first_index} came")
                num_tokens += len(event.token_ids)
                prompt_logprobs += map(logprobs_from_wire, event.prompt_logprobs)
                if event.finish_reason:
                    self._on_stages(seconds_by_stage(event.stages))
                if event.token_ids:
                    yield _checked(event, sampling, len(request.prompt_token_ids), prompt_logprobs)
                if event.finish_reason:
                    return
            raise WorkerLostError("A worker ended a stream without a finish reason.")
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        except asyncio.CancelledError:
            if self._ended_the_call():
                raise UnavailableError(ENDING) from None
            raise
        finally:
            self._calls.discard(call)
            call.cancel()


def _request(
    placement: Placement,
    prompt_token_ids: tuple[int, ...],
    sampling: SamplingParams,
    num_delivered: int,
    cache_salt: bytes,
    urgency: Urgency,
) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=placement.request_id,
        prompt_token_ids=prompt_token_ids,
        sampling=sampling_to_wire(sampling),
        prefill_address=placement.prefill.address if placement.prefill is not None else "",
        cache_salt=cache_salt,
        num_delivered_tokens=num_delivered,
        urgency=urgency_to_wire(urgency),
    )


@dataclass(slots=True)
class _Setbacks:
    """Where a sequence could not stay, and what that means for its next placement."""

    avoid: list[str] = field(default_factory=list)
    stay_on: str = ""
    num_failures: int = 0  # a worker that sends it on, the first time, is none

    def note(self, placement: Placement, error: UnavailableError) -> None:
        culprit = _culprit(placement, error)
        self.num_failures += not isinstance(error, MovedError) or culprit in self.avoid
        # Once: it may be the decode worker after all that its prefill workers cannot reach.
        is_first_break = not self.avoid and culprit != placement.decode.worker_id
        self.stay_on = placement.decode.worker_id if is_first_break else ""
        self.avoid.append(culprit)


def _reason(error: UnavailableError) -> Interruption:
    if isinstance(error, MovedError):
        return Interruption.MOVED
    return Interruption.WORKER_LOST if isinstance(error, WorkerLostError) else Interruption.HANDOFF


def _culprit(placement: Placement, error: UnavailableError) -> str:
    """The worker to try without: a decode worker that still answers speaks of its prefill worker."""
    if placement.prefill is None or isinstance(error, WorkerLostError | MovedError):
        return placement.decode.worker_id
    return placement.prefill.worker_id


def _checked(
    event: pb.TokenEvent, sampling: SamplingParams, num_prompt_tokens: int, prompt_logprobs: Sequence[TokenLogprobs]
) -> TokenBatch:
    """Tokens with everything that was asked for beside them.

    Raises:
        InvariantError: the log-probabilities are not those that were asked for.
    """
    is_first = event.first_index == 0
    num_wanted = 0 if sampling.logprobs is None else len(event.token_ids)
    num_wanted_prompt = 0 if sampling.prompt_logprobs is None else num_prompt_tokens - 1
    if len(event.logprobs) != num_wanted or (is_first and len(prompt_logprobs) != num_wanted_prompt):
        raise InvariantError("a worker sent other log-probabilities than were asked for")
    return TokenBatch(
        event.first_index,
        tuple(event.token_ids),
        FinishReason(event.finish_reason) if event.finish_reason else None,
        tuple(map(logprobs_from_wire, event.logprobs)),
        tuple(prompt_logprobs) if is_first else (),
        event.num_cached_tokens,
    )
