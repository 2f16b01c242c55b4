"""Between our dataclasses and errors, and the worker's protobuf messages and gRPC status codes."""

from __future__ import annotations

from typing import NoReturn

import grpc

from kvcache.errors import (
    OverloadedError,
    RequestError,
    TransferError,
    TwinpoolError,
    UnavailableError,
    WorkerLostError,
)
from kvcache.transfer.grpc_port import transfer_error_from
from kvcache.transfer.wire import FAULT_METADATA_KEY
from scheduler.request import SamplingParams
from workers import worker_pb2 as pb

PARAM_METADATA_KEY = "twinpool-param"


def sampling_to_wire(sampling: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
    )


def sampling_from_wire(sampling: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop_token_ids=tuple(sampling.stop_token_ids),
    )


async def abort_rpc(context: grpc.aio.ServicerContext, error: TwinpoolError) -> NoReturn:
    """Ends an RPC with the status that ``error_from_rpc`` turns into the same error on the other side."""
    code = grpc.StatusCode.INTERNAL
    metadata: tuple[tuple[str, str], ...] = ()
    if isinstance(error, RequestError):
        code, metadata = grpc.StatusCode.INVALID_ARGUMENT, ((PARAM_METADATA_KEY, error.param or ""),)
    elif isinstance(error, UnavailableError):
        code = grpc.StatusCode.ABORTED
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
            return UnavailableError(details)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.DEADLINE_EXCEEDED:
            return WorkerLostError("A worker was lost while it worked on the request.")
        case _:
            return TwinpoolError(f"{error.code().name}: {details}")
