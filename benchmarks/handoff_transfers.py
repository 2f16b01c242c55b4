"""Real handoffs from this process to another: gather, checksum, send, verify, scatter, commit."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass
from statistics import mean

from benchmarks.handoff_links import Peer
from benchmarks.handoff_memory import buffer_bytes
from benchmarks.handoff_peer import make_cache
from kvcache.spec import KVCacheSpec
from kvcache.transfer.port import KVPort, send_kv
from kvcache.transfer.sender import OutgoingTransfer, PrefillOutcome, TransferTarget

STALL_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.01
SETTLE_BYTES = 1 << 20  # less is no buffer
SETTLE_POLLS = 30  # without a change: nothing moves any more


@dataclass(frozen=True, slots=True)
class Together:
    """Handoffs that start at the same moment."""

    gb_s: float  # of all
    slowest_over_mean: float  # of their durations


@dataclass(frozen=True, slots=True)
class BufferMemory:
    """What both processes hold, for each handoff whose receiver has stopped reading, in chunks."""

    sender_chunks: float
    receiver_chunks: float
    sender_retained_bytes: int  # when all have ended
    receiver_retained_bytes: int


class Sender:
    """The sending half of a prefill worker. Sequences are whole already, so only the handoff takes time."""

    def __init__(self, spec: KVCacheSpec, num_blocks: int, peer: Peer) -> None:
        self.spec = spec
        self._manager, self._storage = make_cache(spec, num_blocks)
        self._peer = peer
        self._names = (f"transfer-{index}" for index in itertools.count())

    async def send_one(self, port: KVPort, num_tokens: int) -> float:
        """Returns GB/s."""
        return (await self.send_together(port, 1, num_tokens)).gb_s

    async def send_together(self, port: KVPort, count: int, num_tokens: int) -> Together:
        transfers = self._begin(count, num_tokens)
        started_s = time.perf_counter()

        async def timed(transfer: OutgoingTransfer) -> tuple[int, float]:
            num_bytes = await self._send(port, transfer)
            return num_bytes, time.perf_counter() - started_s

        sizes, durations = zip(*await asyncio.gather(*map(timed, transfers)), strict=True)
        return Together(sum(sizes) / max(durations) / 1e9, max(durations) / mean(durations))

    async def measure_memory(self, port: KVPort, count: int, num_tokens: int) -> BufferMemory:
        """``count`` handoffs whose receiver stops reading after a chunk, and what is left when they have ended."""
        before, peer_before = buffer_bytes(), self._peer.ask(hold=True)["buffer_bytes"]
        transfers = self._begin(count, num_tokens)
        sending = [asyncio.create_task(self._send(port, transfer)) for transfer in transfers]
        held, peer_held = await self._settled()
        self._peer.ask(hold=False)
        await asyncio.gather(*sending)
        chunk_bytes = transfers[0].max_payload_bytes
        del transfers, sending
        after, peer_after = await self._settled()
        return BufferMemory(
            (held - before) / count / chunk_bytes,
            (peer_held - peer_before) / count / chunk_bytes,
            after - before,
            peer_after - peer_before,
        )

    async def _settled(self) -> tuple[int, int]:
        """Buffer bytes here and there, once neither changes any more."""
        seen, same = (0, 0), 0
        while same < SETTLE_POLLS:
            await asyncio.sleep(POLL_INTERVAL_S)
            now = buffer_bytes() // SETTLE_BYTES, int(self._peer.ask()["buffer_bytes"]) // SETTLE_BYTES
            same = same + 1 if now == seen else 0
            seen = now
        return seen[0] * SETTLE_BYTES, seen[1] * SETTLE_BYTES

    def _begin(self, count: int, num_tokens: int) -> list[OutgoingTransfer]:
        names = list(itertools.islice(self._names, count))
        self._peer.ask(reserve=names, num_tokens=num_tokens)
        return [self._transfer(name, num_tokens) for name in names]

    def _transfer(self, name: str, num_tokens: int) -> OutgoingTransfer:
        self._manager.extend(name, num_tokens)
        lease = self._manager.leases.open(name, name, self._manager.block_table(name), time.monotonic())
        self._manager.leases.start_sending(lease)
        transfer = OutgoingTransfer(self._storage, lease, TransferTarget(self._peer.address, name, lease.epoch))
        transfer.complete(PrefillOutcome(first_token_id=1))
        return transfer

    async def _send(self, port: KVPort, transfer: OutgoingTransfer) -> int:
        num_bytes = await send_kv(port, transfer, STALL_TIMEOUT_S)
        self._manager.leases.commit(transfer.lease)
        self._manager.free(transfer.lease.request_id)
        return num_bytes
