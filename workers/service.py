"""The worker's gRPC service: checks what comes off the wire, then calls the roles."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from kvcache.errors import RequestError, TwinpoolError
from kvcache.prefix import MAX_SALT_BYTES
from kvcache.transfer.sender import TransferTarget
from scheduler.request import Request, check_sequence
from scheduler.step_plan import SampledToken
from workers import worker_pb2 as pb
from workers import worker_pb2_grpc as pb_grpc
from workers.decode import DecodeRole
from workers.messages import abort_rpc, logprobs_to_wire, prompt_logprobs_to_wire, sampling_from_wire, urgency_from_wire
from workers.offers import OfferTaker
from workers.prefill import PrefillRole
from workers.stages import StageClock

MAX_ID_LENGTH = 128


@dataclass(frozen=True, slots=True)
class SequenceLimits:
    max_model_len: int
    vocab_size: int


class WorkerService(pb_grpc.WorkerServicer):
    """Serves both roles; which of them gets requests, the scheduler decides."""

    def __init__(self, limits: SequenceLimits, prefill: PrefillRole, decode: DecodeRole, offers: OfferTaker) -> None:
        self._limits = limits
        self._offers = offers
        self._prefill = prefill
        self._decode = decode

    # Both answer through context.write and are no generators: a cancelled call then raises inside our own
    # frames, and what it holds is given back at once.

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        try:
            sequence = self._sequence(request)
            sequence.remote_prefill = bool(request.prefill_address)
            stages = StageClock(time.monotonic())
            async with aclosing(self._decode.generate(sequence, request.prefill_address, stages)) as outputs:
                index = 0
                async for output in outputs:
                    for told in prompt_logprobs_to_wire(output.prompt_logprobs):
                        await context.write(pb.TokenEvent(first_index=index, prompt_logprobs=told))
                    await context.write(_token_event(index, output, stages))
                    index += 1
        except TwinpoolError as error:
            await abort_rpc(context, error)

    async def Prefill(self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext) -> None:
        try:
            _check_id("transfer_id", request.transfer_id)
            _check_id("target_address", request.target_address)
            sequence = self._sequence(request)
            sequence.prefill_only = True
            target = TransferTarget(request.target_address, request.transfer_id, request.epoch, request.num_held_tokens)
            async with aclosing(self._prefill.prefill(sequence, target)) as progress:
                async for message in progress:
                    await context.write(message)
        except TwinpoolError as error:
            await abort_rpc(context, error)

    async def Offer(self, request: pb.OfferRequest, context: grpc.aio.ServicerContext) -> None:
        try:
            _check_salt(request.cache_salt)
            num_tokens = len(request.token_ids)
            if not 1 <= num_tokens <= self._limits.max_model_len:
                raise RequestError(f"an offer has 1 to {self._limits.max_model_len} tokens, not {num_tokens}")
            if max(request.token_ids) >= self._limits.vocab_size:
                raise RequestError(f"token ids are below {self._limits.vocab_size}")
            async with aclosing(self._offers.take(request)) as replies:
                async for reply in replies:
                    await context.write(reply)
        except TwinpoolError as error:
            await abort_rpc(context, error)

    def _sequence(self, request: pb.GenerateRequest | pb.PrefillRequest) -> Request:
        _check_id("request_id", request.request_id)
        prompt_token_ids = tuple(request.prompt_token_ids)
        sampling = sampling_from_wire(request.sampling)
        check_sequence(
            prompt_token_ids,
            sampling,
            max_model_len=self._limits.max_model_len,
            vocab_size=self._limits.vocab_size,
            num_delivered_tokens=request.num_delivered_tokens,
        )
        _check_salt(request.cache_salt)
        return Request(
            request.request_id,
            prompt_token_ids,
            sampling,
            cache_salt=request.cache_salt,
            num_delivered_tokens=request.num_delivered_tokens,
            urgency=urgency_from_wire(request.urgency),
        )


def _token_event(index: int, output: SampledToken, stages: StageClock) -> pb.TokenEvent:
    return pb.TokenEvent(
        first_index=index,
        token_ids=[output.token_id],
        finish_reason=output.finish_reason or "",
        num_cached_tokens=output.request.num_cached_tokens if index == 0 else 0,
        logprobs=[logprobs_to_wire(output.logprobs)] if output.logprobs is not None else (),
        stages=stages.seconds() if output.finish_reason is not None else None,
    )


def _check_salt(cache_salt: bytes) -> None:
    if len(cache_salt) > MAX_SALT_BYTES:
        raise RequestError(f"cache_salt must have at most {MAX_SALT_BYTES} bytes", "cache_salt")


def _check_id(name: str, value: str) -> None:
    if not 1 <= len(value) <= MAX_ID_LENGTH:
        raise RequestError(f"{name} must have 1 to {MAX_ID_LENGTH} characters", name)
