"""One sequence from the user's side: placed, streamed, turned into text, and carried on when a worker is lost."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import grpc

from engine.outputs import ServedModel, TextDelta
from engine.scheduler_client import SchedulerClient
from engine.stop_strings import StopStrings
from engine.tokenizer import Tokenizer
from kvcache.errors import InvariantError, UnavailableError, WorkerLostError
from scheduler.controller import PrefillDone, RequestArrived, RequestEnded
from scheduler.request import FinishReason, SamplingParams, check_sequence
from scheduler.types import ClusterSnapshot, Phase, Placement
from workers import worker_pb2 as pb
from workers import worker_pb2_grpc as pb_grpc
from workers.channels import ChannelPool
from workers.messages import error_from_rpc, sampling_to_wire

MAX_PLACEMENTS = 3  # a sequence that has failed on this many is given up
ENDING = "The server is shutting down."
logger = logging.getLogger(__name__)


class AsyncEngine:
    """Implements ``engine.outputs.TextEngine`` over real workers. One event loop owns it.

    It alone knows which tokens a client was given. When a worker is lost, the sequence is placed again with
    prompt and delivered tokens as its prompt, and goes on at the next token. The draw of a token depends on
    (seed, position) and its logits only, so it is the token that the lost worker would have sent, as far as
    computing the delivered tokens' KV as a prompt gives the same logits: to rounding.
    """

    def __init__(self, model: ServedModel, tokenizer: Tokenizer, scheduler: SchedulerClient) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._channels = ChannelPool()
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
        return all(any(worker.info.role.takes(phase) for worker in self.cluster.workers) for phase in Phase)

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
    ) -> AsyncGenerator[TextDelta, None]:
        """See ``TextEngine.generate``."""
        text = _TextAssembler(self._tokenizer, self._model.eos_token_ids, stop)
        num_tokens = 0
        async with aclosing(self._tokens(tuple(prompt_token_ids), sampling, cache_salt)) as events:
            async for event in events:
                delta = text.push(list(event.token_ids), event.finish_reason)
                if num_tokens == 0:
                    delta = replace(delta, num_cached_tokens=event.num_cached_tokens)
                num_tokens += len(event.token_ids)
                yield delta
                if delta.finish_reason is not None:
                    return

    async def _tokens(
        self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams, cache_salt: bytes
    ) -> AsyncGenerator[pb.TokenEvent, None]:
        """Every token exactly once, over as many placements as it takes."""
        check_sequence(
            prompt_token_ids,
            sampling,
            max_model_len=self._model.max_model_len,
            vocab_size=self._model.vocab_size,
        )
        delivered: list[int] = []
        avoid: list[str] = []
        while True:
            prompt = (*prompt_token_ids, *delivered)
            rest = replace(sampling, max_tokens=sampling.max_tokens - len(delivered))
            placement = await self._scheduler.place(
                RequestArrived(uuid.uuid4().hex, len(prompt), rest.max_tokens, tuple(avoid))
            )
            try:
                async with aclosing(self._run(placement, prompt, rest, cache_salt)) as events:
                    async for event in events:
                        delivered += event.token_ids
                        yield event
                return
            except UnavailableError as error:
                if self._is_ending:
                    raise UnavailableError(ENDING) from None
                avoid.append(_culprit(placement, error))
                if len(avoid) == MAX_PLACEMENTS:
                    raise
                logger.warning("A sequence is placed again after %d tokens: %s", len(delivered), error)

    async def _run(
        self, placement: Placement, prompt_token_ids: tuple[int, ...], sampling: SamplingParams, cache_salt: bytes
    ) -> AsyncGenerator[pb.TokenEvent, None]:
        """Runs a sequence where it was placed, and keeps the scheduler informed."""
        try:
            async with aclosing(self._stream(placement, prompt_token_ids, sampling, cache_salt)) as events:
                async for event in events:
                    if event.first_index == 0:
                        self._scheduler.tell(PrefillDone(placement.request_id))
                    yield event
        finally:
            self._scheduler.tell(RequestEnded(placement.request_id))

    async def _stream(
        self, placement: Placement, prompt_token_ids: tuple[int, ...], sampling: SamplingParams, cache_salt: bytes
    ) -> AsyncGenerator[pb.TokenEvent, None]:
        """The events of one call to a decode worker, checked for gaps and repeats."""
        if self._is_ending:
            raise UnavailableError(ENDING)
        request = pb.GenerateRequest(
            request_id=placement.request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling_to_wire(sampling),
            prefill_address=placement.prefill.address if placement.prefill is not None else "",
            cache_salt=cache_salt,
        )
        call = pb_grpc.WorkerStub(self._channels(placement.decode.address)).Generate(request)
        num_tokens = 0
        self._calls.add(call)
        try:
            async for event in call:
                if event.first_index != num_tokens:
                    raise InvariantError(f"token {num_tokens} was expected and token {event.first_index} came")
                num_tokens += len(event.token_ids)
                yield event
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


def _culprit(placement: Placement, error: UnavailableError) -> str:
    """The worker to try without: a decode worker that still answers speaks of its prefill worker."""
    if placement.prefill is None or isinstance(error, WorkerLostError):
        return placement.decode.worker_id
    return placement.prefill.worker_id


class _TextAssembler:
    """Tokens of one sequence in, text out: characters kept whole, stop strings cut off."""

    def __init__(self, tokenizer: Tokenizer, end_tokens: Sequence[int], stop: Sequence[str]) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._stop = StopStrings(stop)
        self._end_tokens = frozenset(end_tokens)

    def push(self, token_ids: list[int], finish_reason: str) -> TextDelta:
        reason = FinishReason(finish_reason) if finish_reason else None
        stop_token = token_ids[-1] if reason is FinishReason.STOP else None
        visible = token_ids[:-1] if stop_token is not None else token_ids  # a stop token is no part of the text
        text = "".join(self._detokenizer.push(token_id) for token_id in visible)
        if reason is not None:
            text += self._detokenizer.flush()
        cut = self._stop.push(text)
        if cut.stop is not None:
            return TextDelta(cut.text, tuple(token_ids), FinishReason.STOP, cut.stop)
        if reason is not None:
            stop_reason = stop_token if stop_token not in self._end_tokens else None  # as vLLM reports it
            return TextDelta(cut.text + self._stop.flush(), tuple(token_ids), reason, stop_reason)
        return TextDelta(cut.text, tuple(token_ids))
