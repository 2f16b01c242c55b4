"""The prefill role: compute a prompt, sample its first token, hand the KV over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import grpc

from kvcache.storage import PagedStorage
from kvcache.transfer.grpc_port import send_kv
from kvcache.transfer.sender import TransferTarget
from scheduler.request import Request
from workers.step_loop import StepLoop

HEARTBEAT_INTERVAL_S = 1.0


class PrefillRole:
    def __init__(
        self,
        loop: StepLoop,
        storage: PagedStorage,
        clock: Callable[[], float],
        channel_to: Callable[[str], grpc.aio.Channel],
        stall_timeout_s: float,
    ) -> None:
        self._loop = loop
        self._storage = storage
        self._clock = clock
        self._channel_to = channel_to
        self._stall_timeout_s = stall_timeout_s

    async def prefill(self, request: Request, target: TransferTarget) -> AsyncGenerator[int, None]:
        """Prefills into a transfer that the decode worker has opened.

        Yields the number of computed tokens at least every ``HEARTBEAT_INTERVAL_S``; ends after the decode
        worker has acknowledged. Closing the iterator aborts.

        Raises:
            RequestError, OverloadedError: not accepted here.
            TransferError: the handoff was refused or broken.
            TwinpoolError: the prompt could not be computed.
        """
        work = asyncio.create_task(self._compute_and_send(request, target))
        try:
            while not (await asyncio.wait({work}, timeout=HEARTBEAT_INTERVAL_S))[0]:
                yield request.num_computed_tokens
            await work
            yield request.num_computed_tokens
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)  # its error was raised above, unless we are closed

    async def _compute_and_send(self, request: Request, target: TransferTarget) -> None:
        stream = self._loop.submit(request)
        try:
            async for first in stream:
                await self._send(request, target, first.token_id)
        finally:
            self._loop.release(request.request_id)

    async def _send(self, request: Request, target: TransferTarget, first_token_id: int) -> None:
        """The blocks are given back by the caller only after this returned or raised."""
        batcher = self._loop.batcher
        leases = batcher.manager.leases
        lease = batcher.lease_for_handoff(request.request_id, target.transfer_id, self._clock())
        leases.start_sending(lease)
        try:
            await send_kv(
                self._channel_to(target.address),
                self._storage,
                lease,
                target,
                first_token_id,
                self._stall_timeout_s,
            )
            leases.commit(lease)
            batcher.complete_handoff(request.request_id)
        finally:
            leases.abort(lease)
