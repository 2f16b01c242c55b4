"""The decode role: reserve blocks, have a prefill worker fill them, go on from its first token."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

import grpc

from kvcache.errors import InvariantError, MovedError, TransferError, TransferFault, TwinpoolError, UnavailableError
from kvcache.lease import BlockLease
from kvcache.transfer.receiver import ReceivedKV
from scheduler.request import Request, TokenLogprobs
from scheduler.step_plan import SampledToken
from workers import worker_pb2 as pb
from workers.channels import Peer
from workers.messages import error_from_rpc, logprobs_from_wire, sampling_to_wire, urgency_to_wire
from workers.stages import StageClock
from workers.step_loop import StepLoop

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Handoff:
    lease: BlockLease
    task: asyncio.Task[None]


@dataclass(slots=True, eq=False)
class _PrefillLogprobs:
    """What the prefill worker says of a prompt and its first token, beside the KV.

    It comes by another stream than the commit, so the first token waits for it; decoding goes on meanwhile.
    """

    of_prompt: list[TokenLogprobs] = field(default_factory=list)
    of_first_token: TokenLogprobs | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # nothing more will come

    def take(self, message: pb.PrefillProgress) -> None:
        self.of_prompt += map(logprobs_from_wire, message.prompt_logprobs)
        if message.HasField("first_token_logprobs"):
            self.of_first_token = logprobs_from_wire(message.first_token_logprobs)

    async def join(self, output: SampledToken) -> SampledToken:
        """The first token with all that was asked for.

        Raises:
            UnavailableError: the prefill worker ended without it.
        """
        sampling = output.request.sampling
        num_wanted = 0 if sampling.prompt_logprobs is None else output.request.num_prompt_tokens - 1
        if sampling.logprobs is None and num_wanted == 0:
            return output
        await self.ended.wait()
        if len(self.of_prompt) != num_wanted or (self.of_first_token is None) != (sampling.logprobs is None):
            raise UnavailableError("The prefill worker ended without the log-probabilities of the prompt.")
        return replace(output, logprobs=self.of_first_token, prompt_logprobs=tuple(self.of_prompt))


class DecodeRole:
    """Serves sequences to the gateway. Without a prefill address a sequence is prefilled in place."""

    def __init__(
        self,
        loop: StepLoop,
        clock: Callable[[], float],
        peer_at: Callable[[str], Peer],
        own_address: Callable[[], str],
        failures: Counter[TransferFault],
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._peer_at = peer_at
        self._own_address = own_address
        self._moves = False  # what is here, and what still comes, is to go on elsewhere
        self._request_ids: set[str] = set()  # of all sequences here
        self._prefill_addresses: dict[str, str] = {}
        self._prefill_logprobs: dict[str, _PrefillLogprobs] = {}  # until the first token was handed out
        self._stages: dict[str, StageClock] = {}  # of those that are to be prefilled elsewhere
        self._handoffs: dict[str, _Handoff] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself holds its tasks only weakly
        self._failures = failures
        self.on_turn_end: Callable[[Request, str], None] | None = None  # hears who prefilled what has ended well
        loop.on_reserved = self._start_handoff

    async def generate(
        self, request: Request, prefill_address: str, stages: StageClock
    ) -> AsyncGenerator[SampledToken, None]:
        """Streams the sequence's tokens. Closing the iterator aborts it here and on the prefill worker.

        ``stages`` hears how far it is.

        Raises:
            RequestError, OverloadedError: not accepted here.
            UnavailableError: the prefill worker was lost, or the handoff failed.
            MovedError: this worker drains, and its time is over.
            TwinpoolError: the sequence could not be computed.
        """
        request_id = request.request_id
        if not request.remote_prefill:
            await self._loop.prepare(request)
        if self._moves:
            raise _moved()
        stream = self._loop.submit(request)
        self._request_ids.add(request_id)
        if request.remote_prefill:
            self._prefill_addresses[request_id] = prefill_address
            self._prefill_logprobs[request_id] = _PrefillLogprobs()
            self._stages[request_id] = stages
        try:
            async for output in stream:
                stages.token(self._clock(), stream.begun_s)
                awaited = self._prefill_logprobs.pop(request_id, None)
                if output.finish_reason is not None and prefill_address and self.on_turn_end is not None:
                    self.on_turn_end(request, prefill_address)
                yield output if awaited is None else await awaited.join(output)
        finally:
            self._request_ids.discard(request_id)
            self._prefill_addresses.pop(request_id, None)
            self._prefill_logprobs.pop(request_id, None)
            self._stages.pop(request_id, None)
            self._end_handoff(request_id)
            self._loop.release(request_id)

    def move_away(self, *, moves: bool) -> None:
        """Whether every sequence is to end here and to go on elsewhere, those that still come included."""
        self._moves = moves
        for request_id in tuple(self._request_ids) if moves else ():
            self._loop.fail(request_id, _moved())

    def receive(self, received: ReceivedKV) -> None:
        """A handoff was verified and committed: the sequence joins the batch. Called by the KV service."""
        self._handoffs.pop(received.request_id, None)
        first = self._loop.batcher.attach(received.request_id, received.first_token_id, received.num_cached_tokens)
        self._loop.deliver(first)
        self._loop.wake()

    def _start_handoff(self, request: Request) -> None:
        lease = self._loop.batcher.lease_for_arrival(request.request_id, uuid.uuid4().hex, self._clock())
        self._stages[request.request_id].reserve(self._clock())
        task = asyncio.create_task(self._hand_off(request, lease))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._handoffs[request.request_id] = _Handoff(lease, task)

    def _end_handoff(self, request_id: str) -> None:
        """Stops a handoff that is under way: from here on its chunks are refused."""
        handoff = self._handoffs.pop(request_id, None)
        if handoff is not None:
            self._loop.batcher.manager.leases.abort(handoff.lease)
            handoff.task.cancel()

    async def _hand_off(self, request: Request, lease: BlockLease) -> None:
        """Asks for the prefill and keeps the lease alive while the prefill worker is heard of."""
        error: TwinpoolError = TransferError(TransferFault.INCOMPLETE, "the prefill worker ended without a commit")
        try:
            await self._follow_prefill(request, lease)
        except TwinpoolError as raised:
            error = raised
        except Exception as raised:  # the request's boundary: its client must not wait for ever
            logger.exception("Handoff of request %s failed unexpectedly.", request.request_id)
            error = TwinpoolError(f"{type(raised).__name__} during the handoff")
        finally:
            self._loop.batcher.manager.leases.abort(lease)  # no effect after a commit
        handoff = self._handoffs.get(request.request_id)
        if handoff is not None and handoff.lease is lease:  # gone once attached: then the end is no news
            del self._handoffs[request.request_id]
            logger.warning("Handoff of request %s failed: %s", request.request_id, error)
            if self._goes_on_here(request, lease, error):
                self._prefill_logprobs.pop(request.request_id, None)  # those of the first token come with it
                self._loop.wake()
            else:
                self._loop.fail(request.request_id, _as_client_error(error))

    def _goes_on_here(self, request: Request, lease: BlockLease, error: TwinpoolError) -> bool:
        """Keeps what was verified before the handoff broke; True when the rest is computed in place.

        Not when computing the prompt failed: nobody is to start from its KV.
        """
        if not isinstance(error, TransferError | UnavailableError):
            return False
        return self._loop.batcher.keep_received(request.request_id, lease.num_verified_tokens)

    async def _follow_prefill(self, request: Request, lease: BlockLease) -> None:
        peer = self._peer_at(self._prefill_addresses[request.request_id])
        call = peer.worker.Prefill(self._prefill_request(request, lease))
        leases = self._loop.batcher.manager.leases
        logprobs, stages = self._prefill_logprobs[request.request_id], self._stages[request.request_id]
        try:
            while True:
                message = await self._read_before_expiry(call, lease)
                if not isinstance(message, pb.PrefillProgress):  # the end of the stream
                    return
                logprobs.take(message)
                if message.HasField("seconds"):
                    stages.take_prompt(message.seconds)
                if lease.is_open:
                    leases.renew(lease, self._clock())
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        finally:
            logprobs.ended.set()
            call.cancel()

    async def _read_before_expiry(self, call: grpc.aio.UnaryStreamCall, lease: BlockLease) -> object:
        """The next heartbeat. Chunks that arrive meanwhile renew the lease too, so the end may move."""
        reading = asyncio.ensure_future(call.read())
        try:
            while True:
                remaining = lease.expires_at_s - self._clock()
                if remaining <= 0:
                    self._failures[TransferFault.EXPIRED] += 1
                    raise TransferError(TransferFault.EXPIRED, "the prefill worker has not been heard of")
                done, _ = await asyncio.wait({reading}, timeout=remaining)
                if done:
                    return reading.result()
        finally:
            reading.cancel()

    def _prefill_request(self, request: Request, lease: BlockLease) -> pb.PrefillRequest:
        return pb.PrefillRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=sampling_to_wire(request.sampling),
            target_address=self._own_address(),
            transfer_id=lease.transfer_id,
            epoch=lease.epoch,
            num_held_tokens=lease.first_block * self._loop.batcher.manager.spec.block_size,
            cache_salt=request.cache_salt,
            num_delivered_tokens=request.num_delivered_tokens,
            urgency=urgency_to_wire(request.urgency),
        )


def _moved() -> MovedError:
    return MovedError("The worker is drained, and what ran there goes on elsewhere.")


def _as_client_error(error: TwinpoolError) -> TwinpoolError:
    """What the gateway is told: a broken handoff is not the client's fault and may work elsewhere."""
    if isinstance(error, TransferError | InvariantError):
        return UnavailableError(f"The handoff of the prompt's KV failed ({error}).")
    return error
