"""A prefill worker that sends what a test tells it to: the other end of every bad handoff."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import grpc
import pytest

from kvcache.errors import TransferFault
from kvcache.spec import KVCacheSpec
from kvcache.transfer import kv_transfer_pb2 as kv_pb
from kvcache.transfer import kv_transfer_pb2_grpc as kv_pb_grpc
from kvcache.transfer.wire import FAULT_METADATA_KEY, ChunkRange, chunk_header, make_chunk, make_commit, spec_to_wire
from scheduler.request import SamplingParams
from tests.cluster import LocalCluster
from workers import worker_pb2 as pb
from workers import worker_pb2_grpc as pb_grpc
from workers.channels import SERVER_OPTIONS
from workers.messages import sampling_to_wire


class FakePrefill(pb_grpc.WorkerServicer):
    """Accepts every prompt and is silent. A handoff waits in ``handoffs`` until the test ends its call."""

    def __init__(self) -> None:
        self.address = ""
        self.ended = 0  # calls that the test has ended
        self.cancelled = 0  # calls that the decode worker gave up
        self.handoffs: asyncio.Queue[Handoff] = asyncio.Queue()

    async def Prefill(self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext) -> None:
        handoff = Handoff(request, asyncio.get_running_loop().create_future())
        self.handoffs.put_nowait(handoff)
        try:
            code = await handoff.answer
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.ended += 1
        if code is not grpc.StatusCode.OK:
            await context.abort(code, "the test says so")


@dataclass(slots=True)
class Handoff:
    """One call to the fake worker."""

    request: pb.PrefillRequest
    answer: asyncio.Future[grpc.StatusCode]  # how the call ends

    def end(self, code: grpc.StatusCode) -> None:
        self.answer.set_result(code)

    def missing(self, spec: KVCacheSpec) -> range:
        """The logical blocks that the decode worker wants."""
        first_block = self.request.num_held_tokens // spec.block_size
        return range(first_block, spec.num_blocks_for(len(self.request.prompt_token_ids)))

    def opening(self, spec: KVCacheSpec) -> kv_pb.TransferMessage:
        opening = kv_pb.TransferOpen(
            transfer_id=self.request.transfer_id,
            epoch=self.request.epoch,
            spec=spec_to_wire(spec),
            num_blocks=len(self.missing(spec)),
            first_block=self.missing(spec).start,
        )
        return kv_pb.TransferMessage(open=opening)

    def chunks(self, spec: KVCacheSpec) -> list[kv_pb.TransferMessage]:
        """All of the KV, one chunk per layer, zeros throughout and rightly sealed."""
        missing = self.missing(spec)
        payload = bytes(len(missing) * spec.layer_block_bytes)
        ranges = (ChunkRange(layer, missing.start, len(missing)) for layer in range(spec.num_layers))
        return [self.chunk(index, where, payload) for index, where in enumerate(ranges)]

    def chunk(self, index: int, where: ChunkRange, payload: bytes) -> kv_pb.TransferMessage:
        chunk = chunk_header(make_chunk(self.request.transfer_id, self.request.epoch, index, where, payload))
        chunk.payload = payload
        return kv_pb.TransferMessage(chunk=chunk)

    def commit(self, num_chunks: int, first_token_id: int = 7) -> kv_pb.TransferMessage:
        commit = make_commit(self.request.transfer_id, self.request.epoch, num_chunks, first_token_id)
        return kv_pb.TransferMessage(commit=commit)

    def messages(self, spec: KVCacheSpec) -> list[kv_pb.TransferMessage]:
        """A whole handoff that the receiver accepts."""
        chunks = self.chunks(spec)
        return [self.opening(spec), *chunks, self.commit(len(chunks))]


@asynccontextmanager
async def fake_prefill() -> AsyncIterator[FakePrefill]:
    fake = FakePrefill()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    pb_grpc.add_WorkerServicer_to_server(fake, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(None)


class GenerateCall:
    """A call to a decode worker, past the gateway, read to its end in the background."""

    def __init__(
        self,
        cluster: LocalCluster,
        worker_id: str,
        request_id: str,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        prefill_address: str = "",
    ) -> None:
        request = pb.GenerateRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=sampling_to_wire(sampling),
            prefill_address=prefill_address,
        )
        self.request_id = request_id
        self.token_ids: list[int] = []
        self._call = cluster.stub(worker_id).Generate(request)
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for event in self._call:
            self.token_ids += event.token_ids

    async def finished(self) -> tuple[int, ...]:
        await asyncio.wait_for(self._reading, 10)
        return tuple(self.token_ids)

    async def leave(self) -> None:
        """The client goes away."""
        self._call.cancel()
        await asyncio.wait({self._reading})

    async def error(self, within_s: float = 10) -> grpc.aio.AioRpcError:
        """How the call failed."""
        try:
            await asyncio.wait_for(self._reading, within_s)
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError(f"the call ended well, after {len(self.token_ids)} tokens")


async def send(channel: grpc.aio.Channel, messages: Iterable[kv_pb.TransferMessage]) -> kv_pb.TransferReceipt:
    """Writes the messages, ends the stream and returns the answer, which may be an AioRpcError.

    By the stubs of the .proto, as any engine could.
    """
    call = kv_pb_grpc.KVTransferStub(channel).Send()
    with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # ended by the other side: the answer tells why
        for message in messages:
            await call.write(message)
        await call.done_writing()
    receipt: kv_pb.TransferReceipt = await call
    return receipt


def fault_in(error: grpc.aio.AioRpcError) -> str | bytes | None:
    return dict(error.trailing_metadata() or ()).get(FAULT_METADATA_KEY)


def lost_by_grpc(error: grpc.aio.AioRpcError) -> bool:
    """A write that meets the end of its call makes grpc forget how the call ended; the receiver's count tells."""
    return error.code() is grpc.StatusCode.INTERNAL and "execute_batch" in error.debug_error_string()


async def expect_refusal(
    cluster: LocalCluster, messages: Iterable[kv_pb.TransferMessage], fault: TransferFault
) -> None:
    before = cluster.failures("decode-0")
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await send(cluster.channel("decode-0"), messages)
    assert lost_by_grpc(refusal.value) or fault_in(refusal.value) == fault.value
    assert cluster.failures("decode-0") == {**before, fault.value: before.get(fault.value, 0) + 1}
