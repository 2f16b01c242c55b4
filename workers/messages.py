"""Between our dataclasses and errors, and the worker's protobuf messages and gRPC status codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import grpc

from kvcache.errors import (
    MovedError,
    OverloadedError,
    RequestError,
    TransferError,
    TwinpoolError,
    UnavailableError,
    WorkerLostError,
)
from kvcache.transfer.grpc_port import transfer_error_from
from kvcache.transfer.wire import FAULT_METADATA_KEY
from scheduler.request import SamplingParams, TokenLogprobs
from scheduler.urgency import ServiceClass, Urgency, check_priority
from workers import worker_pb2 as pb

PARAM_METADATA_KEY = "twinpool-param"
MOVED_METADATA_KEY = "twinpool-moved"
LOGPROBS_IN_MESSAGE = 1024  # a few hundred bytes each


def sampling_to_wire(sampling: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=[pb.LogitBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
        bad_words=[pb.TokenSequence(token_ids=word) for word in sampling.bad_words],
        allowed_token_ids=sampling.allowed_token_ids,
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def sampling_from_wire(sampling: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop_token_ids=tuple(sampling.stop_token_ids),
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        logit_bias=tuple((each.token_id, each.bias) for each in sampling.logit_bias),
        bad_words=tuple(tuple(word.token_ids) for word in sampling.bad_words),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
    )


def urgency_to_wire(urgency: Urgency) -> pb.Urgency:
    return pb.Urgency(is_batch=urgency.is_batch, priority=urgency.priority)


def urgency_from_wire(urgency: pb.Urgency) -> Urgency:
    """
    Raises:
        RequestError: the priority is out of bounds.
    """
    check_priority(urgency.priority)
    return Urgency(ServiceClass.BATCH if urgency.is_batch else ServiceClass.INTERACTIVE, urgency.priority)


def logprobs_to_wire(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def logprobs_from_wire(logprobs: pb.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(logprobs.logprob, logprobs.rank, tuple(logprobs.top_token_ids), tuple(logprobs.top_logprobs))


def prompt_logprobs_to_wire(logprobs: Sequence[TokenLogprobs]) -> Iterator[list[pb.TokenLogprobs]]:
    """In slices that fit into a message with room to spare."""
    for first in range(0, len(logprobs), LOGPROBS_IN_MESSAGE):
        yield [logprobs_to_wire(each) for each in logprobs[first : first + LOGPROBS_IN_MESSAGE]]


async def abort_rpc(context: grpc.aio.ServicerContext, error: TwinpoolError) -> NoReturn:
    """Ends an RPC with the status that ``error_from_rpc`` turns into the same error on the other side."""
    code = grpc.StatusCode.INTERNAL
    metadata: tuple[tuple[str, str], ...] = ()
    if isinstance(error, RequestError):
        code, metadata = grpc.StatusCode.INVALID_ARGUMENT, ((PARAM_METADATA_KEY, error.param or ""),)
    elif isinstance(error, UnavailableError):
        code = grpc.StatusCode.ABORTED
        metadata = ((MOVED_METADATA_KEY, ""),) if isinstance(error, MovedError) else ()
    elif isinstance(error, OverloadedError):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
    elif isinstance(error, TransferError):
        code, metadata = grpc.StatusCode.FAILED_PRECONDITION, ((FAULT_METADATA_KEY, error.fault.value),)
    message = error.message if isinstance(error, TransferError) else str(error)
    await context.abort(code, message, metadata)
    raise AssertionError("abort always raises")


def error_from_rpc(error: grpc.aio.AioRpcError) -> TwinpoolError:
    """The error that the other side raised; a lost connection is an ``UnavailableError``."""
    details = error.details() or ""
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            metadata = dict(error.trailing_metadata() or ())
            return RequestError(details, str(metadata.get(PARAM_METADATA_KEY, "")) or None)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return OverloadedError(details)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return transfer_error_from(error)
        case grpc.StatusCode.ABORTED:
            is_moved = MOVED_METADATA_KEY in dict(error.trailing_metadata() or ())
            return MovedError(details) if is_moved else UnavailableError(details)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.DEADLINE_EXCEEDED:
            return WorkerLostError("A worker was lost while it worked on the request.")
        case _:
            return TwinpoolError(f"{error.code().name}: {details}")
