"""Blocks on their way back: after a turn, a decode worker offers what it computed to the prefill worker of the prompt.

So the next turn of a conversation finds prompt and answer in the prefix cache of whoever prefills it. ::

    decode worker                                   prefill worker
    Offer(tokens)            ───────────────────►   reserves blocks for what it lacks, with a lease
                             ◄───────────────────   transfer id, epoch, what it holds; or nothing: declined
    KVTransfer.Send(blocks)  ───────────────────►   verifies; after the commit the blocks are cached, and free
                             ◄───────────────────   end of the Offer call

It is a handoff like any other, in the other direction, and the least urgent of all: one at a time, under a budget of
bytes, from and into blocks that nobody needs now, and dropped whenever something is in its way.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

import grpc

from kvcache.errors import OverloadedError, TwinpoolError, UnavailableError
from kvcache.lease import BlockLease
from kvcache.manager import KVCacheManager
from kvcache.prefix import HashChain
from kvcache.storage import BlockStorage
from kvcache.transfer.port import KVPort, send_kv
from kvcache.transfer.sender import OutgoingTransfer, PrefillOutcome, TransferTarget
from scheduler.request import Request
from workers import worker_pb2 as pb
from workers.channels import Peer
from workers.messages import error_from_rpc

MAX_WAITING = 16  # offers; KV that waits longer is evicted before its turn anyway
MAX_TAKEN = 2  # offers that one worker takes at once
FREE_SHARE = 4  # an offer uses at most one in so many of the free blocks
BURST_S = 10.0  # the budget of so many seconds may be used at once
OFFER = "offer-"  # begins the names of sequences here; those of requests are hexadecimal
logger = logging.getLogger(__name__)


class ByteBudget:
    """So many bytes per second. The time is an argument."""

    def __init__(self, bytes_per_second: int, now: float) -> None:
        self._rate = bytes_per_second
        self._left = bytes_per_second * BURST_S
        self._counted_at_s = now

    def take(self, num_bytes: int, now: float) -> bool:
        """False, and nothing taken, when there is not so much left now."""
        self._left = min(self._left + self._rate * (now - self._counted_at_s), self._rate * BURST_S)
        self._counted_at_s = now
        if num_bytes > self._left:
            return False
        self._left -= num_bytes
        return True


@dataclass(frozen=True, slots=True)
class _Turn:
    """A sequence that has ended here, as far as its KV was computed."""

    token_ids: tuple[int, ...]
    cache_salt: bytes
    address: str  # of the worker that prefilled it


class OfferMaker:
    """The decode side. Owned by one event loop; ``run`` is its only task."""

    def __init__(
        self,
        manager: KVCacheManager,
        storage: BlockStorage,
        clock: Callable[[], float],
        peer_at: Callable[[str], Peer],
        port: KVPort,
        bytes_per_second: int,
        stall_timeout_s: float,
    ) -> None:
        """``bytes_per_second``: 0 makes no offers."""
        self._manager = manager
        self._storage = storage
        self._clock = clock
        self._peer_at = peer_at
        self._port = port
        self._budget = ByteBudget(bytes_per_second, clock())
        self._is_on = bytes_per_second > 0
        self._stall_timeout_s = stall_timeout_s
        self._waiting: asyncio.Queue[_Turn] = asyncio.Queue(MAX_WAITING)
        self.sent_bytes = 0
        self.num_dropped = 0  # for want of budget, of blocks, or because the other side broke off

    def offer(self, request: Request, address: str) -> None:
        """A sequence is about to end. Returns at once."""
        if not self._is_on:
            return
        if self._waiting.full():
            self.num_dropped += 1
            return
        known = tuple(request.token_ids[: request.num_computed_tokens])
        self._waiting.put_nowait(_Turn(known, request.cache_salt, address))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            turn = await self._waiting.get()
            try:
                await self._make(turn)
            except TwinpoolError as error:
                self.num_dropped += 1
                logger.info("An offer to %s was dropped: %s", turn.address, error)
            except Exception:  # this loop's top: one turn's failure is its own
                self.num_dropped += 1
                logger.exception("An offer to %s failed unexpectedly.", turn.address)

    async def _make(self, turn: _Turn) -> None:
        block_size = self._manager.spec.block_size
        hashes = HashChain(turn.cache_salt, block_size).hashes(turn.token_ids)
        num_tokens = len(self._manager.find_prefix(hashes)) * block_size  # what was not evicted meanwhile
        if num_tokens == 0:
            return
        request = pb.OfferRequest(
            token_ids=turn.token_ids[:num_tokens], cache_salt=turn.cache_salt, dtype=self._manager.spec.dtype
        )
        try:
            call = self._peer_at(turn.address).worker.Offer(request)
        except grpc.aio.UsageError:
            raise UnavailableError("the connection is closed") from None
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                reply = await call.read()
            if isinstance(reply, pb.OfferReply) and reply.transfer_id:
                await self._send(turn.address, reply, hashes)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        except TimeoutError:
            raise UnavailableError("there was no answer") from None
        finally:
            call.cancel()

    async def _send(self, address: str, reply: pb.OfferReply, hashes: Sequence[bytes]) -> None:
        manager, spec = self._manager, self._manager.spec
        num_blocks = spec.num_blocks_for(reply.num_tokens)
        prefix = manager.find_prefix(hashes[:num_blocks])
        first_block = reply.num_held_tokens // spec.block_size
        name = OFFER + reply.transfer_id
        num_tokens = num_blocks * spec.block_size
        if len(prefix) < num_blocks or manager.num_blocks_to_begin(num_tokens, prefix) > manager.num_free // FREE_SHARE:
            raise OverloadedError("its blocks are gone, or free ones are scarce")
        if not self._budget.take((num_blocks - first_block) * spec.block_bytes, self._clock()):
            raise OverloadedError("the budget is used up")
        manager.begin(name, num_tokens, prefix)
        leases = self._manager.leases
        lease = leases.open(reply.transfer_id, name, prefix[first_block:], self._clock(), reply.epoch, first_block)
        try:
            leases.start_sending(lease)
            target = TransferTarget(address, reply.transfer_id, reply.epoch, reply.num_held_tokens)
            transfer = OutgoingTransfer(self._storage, lease, target)
            transfer.complete(PrefillOutcome(first_token_id=0))
            self.sent_bytes += await send_kv(self._port, transfer, self._stall_timeout_s)
            leases.commit(lease)
        finally:
            leases.abort(lease)  # no effect after the commit
            self._manager.free(name)


@dataclass(slots=True, eq=False)
class _Taking:
    lease: BlockLease
    hashes: list[bytes]
    ended: asyncio.Event


class OfferTaker:
    """The prefill side: reserves blocks for an offer and caches what comes."""

    def __init__(self, manager: KVCacheManager, clock: Callable[[], float]) -> None:
        self._manager = manager
        self._clock = clock
        self._takings: dict[str, _Taking] = {}

    def __contains__(self, name: str) -> bool:
        """Whether a sequence is an offer that is being taken."""
        return name in self._takings

    async def take(self, request: pb.OfferRequest) -> AsyncGenerator[pb.OfferReply, None]:
        """One reply, which declines when it names no transfer; ends when the offer has been taken or given up.

        Closing the iterator gives the blocks back.
        """
        taking = self._reserve(request)
        if taking is None:
            yield pb.OfferReply()
            return
        lease = taking.lease
        block_size = self._manager.spec.block_size
        try:
            yield pb.OfferReply(
                transfer_id=lease.transfer_id,
                epoch=lease.epoch,
                num_held_tokens=lease.first_block * block_size,
                num_tokens=lease.num_tokens,
            )
            while lease.is_open and (remaining := lease.expires_at_s - self._clock()) > 0:
                try:
                    await asyncio.wait_for(taking.ended.wait(), remaining)
                except TimeoutError:
                    continue  # chunks may have renewed it meanwhile
        finally:
            self._manager.leases.abort(lease)  # no effect after the commit
            del self._takings[lease.request_id]
            self._manager.free(lease.request_id)

    def receive(self, name: str) -> None:
        """The blocks of an offer were verified and committed. Called by the KV service."""
        taking = self._takings[name]
        self._manager.cache(name, taking.hashes[taking.lease.first_block :], taking.lease.first_block)
        taking.ended.set()

    def _reserve(self, request: pb.OfferRequest) -> _Taking | None:
        """Blocks for what is missing here; None when there is nothing, no room, or KV that was rounded otherwise."""
        manager = self._manager
        spec = manager.spec
        if not manager.prefix_caching or request.dtype != spec.dtype or len(self._takings) >= MAX_TAKEN:
            return None
        hashes = list(HashChain(request.cache_salt, spec.block_size).hashes(request.token_ids))
        prefix = manager.find_prefix(hashes)
        num_tokens = len(hashes) * spec.block_size
        if (
            len(prefix) == len(hashes)
            or manager.num_blocks_to_begin(num_tokens, prefix) > manager.num_free // FREE_SHARE
        ):
            return None
        transfer_id = uuid.uuid4().hex
        name = OFFER + transfer_id
        if not manager.begin(name, num_tokens, prefix):
            return None
        block_ids = manager.block_table(name)[len(prefix) :]
        lease = manager.leases.open(
            transfer_id, name, block_ids, self._clock(), first_block=len(prefix), num_tokens=num_tokens
        )
        self._takings[name] = taking = _Taking(lease, hashes, asyncio.Event())
        return taking
