"""The prefill role: compute a prompt, hand its KV over as it comes, sample its first token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Container, Iterator
from dataclasses import dataclass

from kvcache.errors import RequestError, TwinpoolError
from kvcache.lease import BlockLease
from kvcache.storage import BlockStorage
from kvcache.transfer.port import KVPort, send_kv
from kvcache.transfer.sender import OutgoingTransfer, PrefillOutcome, TransferTarget
from scheduler.request import Request
from scheduler.step_plan import SampledToken, ScheduledChunk, StepPlan
from workers import worker_pb2 as pb
from workers.messages import logprobs_to_wire, prompt_logprobs_to_wire
from workers.step_loop import StepLoop
from workers.step_times import TransferLedger
from workers.transfer_dtype import WireFormat

HEARTBEAT_INTERVAL_S = 1.0
HEARTBEATS_PER_LEASE = 4  # at least: a lost one costs nothing
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Sending:
    """A handoff whose prompt has begun to be computed."""

    lease: BlockLease
    transfer: OutgoingTransfer
    task: asyncio.Task[int]


@dataclass(frozen=True, slots=True)
class _Growing:
    """A transfer whose prompt is in the running step, and the blocks that are complete after it."""

    request_id: str
    transfer: OutgoingTransfer
    num_blocks: int


class PrefillRole:
    """Computes prompts for decode workers. It is the step loop's ``KVListener``."""

    def __init__(
        self,
        loop: StepLoop,
        storage: BlockStorage,
        clock: Callable[[], float],
        port: KVPort,
        lease_ttl_s: float,
        wire: WireFormat,
    ) -> None:
        self.times = TransferLedger()
        self._loop = loop
        self._storage = storage
        self._clock = clock
        self._port = port
        self._wire = wire
        self._stall_timeout_s = lease_ttl_s
        self._heartbeat_interval_s = min(HEARTBEAT_INTERVAL_S, lease_ttl_s / HEARTBEATS_PER_LEASE)
        self._targets: dict[str, TransferTarget] = {}  # by request id, as long as the request lives
        self._sendings: dict[str, _Sending] = {}
        self._growing: list[_Growing] = []  # what the running step adds to
        loop.kv_listener = self

    async def prefill(self, request: Request, target: TransferTarget) -> AsyncGenerator[pb.PrefillProgress, None]:
        """Prefills into a transfer that the decode worker has opened.

        Yields progress at least every ``HEARTBEAT_INTERVAL_S``, and log-probabilities that were asked for before
        the KV is sent; ends after the decode worker has acknowledged. Closing the iterator aborts.

        Raises:
            RequestError, OverloadedError: not accepted here.
            TransferError: the handoff was refused or broken.
            TwinpoolError: the prompt could not be computed.
        """
        if target.num_held_tokens >= request.num_prompt_tokens:
            raise RequestError(
                f"num_held_tokens is {target.num_held_tokens}; the prompt has {request.num_prompt_tokens} tokens",
                "num_held_tokens",
            )
        outbox: asyncio.Queue[pb.PrefillProgress | None] = asyncio.Queue()
        work = asyncio.create_task(self._compute_and_send(request, target, outbox))
        work.add_done_callback(lambda _: outbox.put_nowait(None))
        try:
            while True:
                try:
                    message = await asyncio.wait_for(outbox.get(), self._heartbeat_interval_s)
                except TimeoutError:
                    message = pb.PrefillProgress(num_computed_tokens=request.num_computed_tokens)
                if message is None:
                    break
                yield message
            await work
            yield pb.PrefillProgress(num_computed_tokens=request.num_computed_tokens)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)  # its error was raised above, unless we are closed

    def begin_step(self, plan: StepPlan) -> bool:
        """Starts the handoffs of prompts that are computed for the first time."""
        self._growing = [growing for chunk in plan.chunks if (growing := self._grow(chunk)) is not None]
        return bool(self._growing)

    def layers_computed(self, num_layers: int) -> None:
        for growing in self._growing:
            growing.transfer.mark_ready(num_layers, growing.num_blocks)

    def end_step(self, failed: Container[str]) -> None:
        """What a sequence that failed has in the layers after its failure is nothing to be sent."""
        for growing in self._growing:
            if growing.request_id not in failed:
                growing.transfer.mark_ready(self._storage.spec.num_layers, growing.num_blocks)
        self._growing = []

    async def _compute_and_send(
        self, request: Request, target: TransferTarget, outbox: asyncio.Queue[pb.PrefillProgress | None]
    ) -> None:
        await self._loop.prepare(request)
        arrived_s = self._clock()
        stream = self._loop.submit(request)
        self._targets[request.request_id] = target
        try:
            async for first in stream:
                for message in _logprobs_messages(first):
                    outbox.put_nowait(message)
                outbox.put_nowait(_prompt_seconds(request, arrived_s, stream.begun_s or arrived_s, self._clock()))
                sending = self._sendings[request.request_id]
                sending.transfer.complete(PrefillOutcome(first.token_id, request.num_cached_tokens))
                started_s, bytes_left = self._clock(), sending.transfer.num_bytes_left
                await sending.task
                self._wire.note_link(target.address, bytes_left, self._clock() - started_s)
                num_bytes = len(sending.lease.block_ids) * self._storage.spec.block_bytes
                self.times.add(target.address, num_bytes, self._clock() - started_s)
                self._loop.batcher.manager.leases.commit(sending.lease)
                self._loop.batcher.complete_handoff(request.request_id)
        finally:
            await self._end(request.request_id)

    async def _end(self, request_id: str) -> None:
        """Nothing is read from the blocks any more when they are given back."""
        del self._targets[request_id]
        sending = self._sendings.pop(request_id, None)
        if sending is not None:
            sending.task.cancel()
            self._loop.batcher.manager.leases.abort(sending.lease)  # no effect after a commit
        self._loop.release(request_id)
        if sending is not None:
            await asyncio.gather(sending.task, return_exceptions=True)

    def _grow(self, chunk: ScheduledChunk) -> _Growing | None:
        if chunk.request_id not in self._targets:
            return None
        if chunk.request_id not in self._sendings:
            try:
                self._start_sending(chunk)
            except TwinpoolError as error:  # the request's boundary: a transfer id that is in use, for one
                self._loop.fail(chunk.request_id, error)
                return None
        sending = self._sendings[chunk.request_id]
        lease = sending.lease
        # The last block counts when the prompt ends in it.
        is_last = chunk.sampling is not None
        end_block = lease.first_block + len(lease.block_ids)
        num_blocks = end_block if is_last else chunk.end // self._storage.spec.block_size
        return _Growing(chunk.request_id, sending.transfer, num_blocks)

    def _start_sending(self, chunk: ScheduledChunk) -> None:
        request_id = chunk.request_id
        target = self._targets[request_id]
        batcher = self._loop.batcher
        first_block = target.num_held_tokens // self._storage.spec.block_size
        lease = batcher.lease_for_handoff(request_id, target.transfer_id, self._clock(), first_block)
        batcher.manager.leases.start_sending(lease)
        end_block = lease.first_block + len(lease.block_ids)
        num_tokens = end_block * self._storage.spec.block_size - chunk.start  # to be computed, to the end of a block
        storage = self._wire.storage_for(target.address, len(lease.block_ids), num_tokens)
        transfer = OutgoingTransfer(storage, lease, target)
        spec = self._storage.spec
        transfer.mark_ready(spec.num_layers, chunk.start // spec.block_size)  # cached: nothing to wait for
        task = asyncio.create_task(send_kv(self._port, transfer, self._stall_timeout_s))
        task.add_done_callback(lambda task: self._sending_ended(request_id, task))
        self._sendings[request_id] = _Sending(lease, transfer, task)

    def _sending_ended(self, request_id: str, task: asyncio.Task[int]) -> None:
        """A handoff that broke while its prompt is being computed ends the computing too."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if not isinstance(error, TwinpoolError):
            logger.error("Sending the KV of request %s failed unexpectedly.", request_id, exc_info=error)
            error = TwinpoolError(f"{type(error).__name__} while the KV was sent")
        self._loop.fail(request_id, error)


def _prompt_seconds(request: Request, arrived_s: float, begun_s: float, now: float) -> pb.PrefillProgress:
    seconds = pb.PromptSeconds(queue=begun_s - arrived_s, compute=now - begun_s)
    return pb.PrefillProgress(num_computed_tokens=request.num_computed_tokens, seconds=seconds)


def _logprobs_messages(first: SampledToken) -> Iterator[pb.PrefillProgress]:
    """What was asked for, in bounded messages."""
    num_computed_tokens = first.request.num_computed_tokens
    for told in prompt_logprobs_to_wire(first.prompt_logprobs):
        yield pb.PrefillProgress(num_computed_tokens=num_computed_tokens, prompt_logprobs=told)
    if first.logprobs is not None:
        told_first = logprobs_to_wire(first.logprobs)
        yield pb.PrefillProgress(num_computed_tokens=num_computed_tokens, first_token_logprobs=told_first)
