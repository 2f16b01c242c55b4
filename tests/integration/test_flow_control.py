"""A receiver that does not read slows its sender down, and holds up nobody else: both sides' buffers are bounded."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from benchmarks.handoff_memory import buffer_bytes
from kvcache.lease import LeaseState
from kvcache.manager import KVCacheManager
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from kvcache.transfer import kv_transfer_pb2 as kv_pb
from kvcache.transfer.grpc_port import GrpcPort, KVTransferService
from kvcache.transfer.port import KVPort, send_kv
from kvcache.transfer.port_choice import HAS_SHM, PortName
from kvcache.transfer.receiver import KVReceiver, ReceivedKV
from kvcache.transfer.sender import OutgoingTransfer, PrefillOutcome, TransferTarget
from kvcache.transfer.shm_port import ShmPort
from kvcache.transfer.shm_service import ShmService
from kvcache.transfer.wire import MAX_CHUNK_BYTES, Chunk, Message
from tests.builders import fill_with_noise
from tests.leaks import until
from workers.channels import SERVER_OPTIONS, ChannelPool

pytestmark = pytest.mark.integration

SPEC = KVCacheSpec(num_layers=8, num_kv_heads=2, head_size=64, block_size=128, dtype="float32")  # 128 KiB a block
BLOCKS = 48  # of one long prompt: 6 MiB a layer, 48 MiB in all
OF_A_CONNECTION = 6 << 20  # what gRPC reads into, however many transfers there are
TIMEOUT_S = 60.0
LIVE = "live"  # a handoff that is never held
PORTS = ["grpc", pytest.param("shm", marks=pytest.mark.skipif(not HAS_SHM, reason="Linux only"))]


class HeldReceiver(KVReceiver):
    """Takes one chunk of each handoff but ``LIVE`` and no more until ``released``; tells in which order chunks were
    taken."""

    released: asyncio.Event
    taken: list[str]  # transfer ids

    async def receive(self, messages: AsyncIterator[Message]) -> kv_pb.TransferReceipt:
        return await super().receive(self._held(messages))

    async def _held(self, messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
        async for message in messages:
            yield message
            if isinstance(message, Chunk):
                self.taken.append(message.transfer_id)
                if message.transfer_id != LIVE:
                    await self.released.wait()


class Ends:
    """A sender's and a receiver's cache, and the real port between them."""

    def __init__(self, port: KVPort, address: str, receiver: HeldReceiver, manager: KVCacheManager) -> None:
        self._port = port
        self._address = address
        self.receiver = receiver
        self._manager = manager  # the receiver's
        self._storage = PagedStorage(SPEC, BLOCKS)
        fill_with_noise(self._storage, 1)
        self._source = KVCacheManager(SPEC, BLOCKS, prefix_caching=False)

    def begin(self, name: str, num_blocks: int, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> asyncio.Task[int]:
        """A handoff whose prompt is computed already."""
        now = time.monotonic()
        for manager in (self._manager, self._source):
            manager.extend(name, num_blocks * SPEC.block_size)
            manager.leases.open(name, name, manager.block_table(name), now, num_tokens=num_blocks * SPEC.block_size)
        lease = self._source.leases.find(name, 1, now)
        self._source.leases.start_sending(lease)
        target = TransferTarget(self._address, name, lease.epoch)
        transfer = OutgoingTransfer(self._storage, lease, target, max_chunk_bytes)
        transfer.complete(PrefillOutcome(first_token_id=1))
        return asyncio.create_task(self._send(transfer))

    async def _send(self, transfer: OutgoingTransfer) -> int:
        try:
            num_bytes = await send_kv(self._port, transfer, TIMEOUT_S)
            self._source.leases.commit(transfer.lease)
            return num_bytes
        finally:
            self._source.leases.abort(transfer.lease)  # no effect after a commit
            self._source.free(transfer.lease.request_id)

    async def give_up(self, sending: dict[str, asyncio.Task[int]]) -> None:
        """Returns when both sides have their blocks back. The receiver reads on, and so notices."""
        leases = list(self._manager.leases)
        for task in sending.values():
            task.cancel()
        await asyncio.gather(*sending.values(), return_exceptions=True)
        self.receiver.released.set()
        await until(lambda: all(lease.state is not LeaseState.SENDING for lease in leases), "the receiver to notice")
        for lease in leases:
            self._manager.leases.abort(lease)  # of those that were never opened
            self._manager.free(lease.request_id)

    def check_nothing_is_left(self) -> None:
        for manager in (self._manager, self._source):
            assert len(manager.leases) == 0
            assert manager.pool.num_free == BLOCKS
            manager.check_integrity()


@asynccontextmanager
async def joined(port: PortName) -> AsyncIterator[Ends]:
    manager = KVCacheManager(SPEC, BLOCKS, prefix_caching=False)
    storage = PagedStorage(SPEC, BLOCKS)

    def received(kv: ReceivedKV) -> None:
        manager.free(kv.request_id)

    receiver = HeldReceiver(manager, storage, time.monotonic, received, Counter())
    receiver.released, receiver.taken = asyncio.Event(), []
    server = grpc.aio.server(options=SERVER_OPTIONS)
    KVTransferService(receiver).add_to(server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    channels = ChannelPool()
    shm = ShmService(receiver)
    if port == "shm":
        shm.start(address)
    try:
        way: KVPort = ShmPort() if port == "shm" else GrpcPort(lambda target: channels(target).channel)
        ends = Ends(way, address, receiver, manager)
        yield ends
        ends.check_nothing_is_left()
    finally:
        await shm.stop()
        await channels.close()
        await server.stop(None)


class Gathered:
    """Payload bytes that have been copied out of the sender's cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_bytes = 0
        next_message = OutgoingTransfer.next_message

        def counted(transfer: OutgoingTransfer, slot: memoryview | None = None) -> Message | None:
            message = next_message(transfer, slot)
            if isinstance(message, Chunk):
                self.num_bytes += len(message.payload)
            return message

        monkeypatch.setattr(OutgoingTransfer, "next_message", counted)

    async def settled(self) -> int:
        """Once it has not grown for half a second."""
        seen, same = -1, 0
        while same < 50:
            await asyncio.sleep(0.01)
            same = same + 1 if self.num_bytes == seen else 0
            seen = self.num_bytes
        return seen


@pytest.mark.parametrize("port", PORTS)
def test_a_receiver_that_does_not_read_bounds_the_buffers_of_both_sides(
    port: PortName, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = Gathered(monkeypatch)

    async def scenario() -> None:
        async with joined(port) as ends:
            before = buffer_bytes()
            sending = ends.begin("long", BLOCKS)
            on_the_way = await gathered.settled()
            assert ends.receiver.taken == ["long"]
            assert on_the_way <= 5 * MAX_CHUNK_BYTES  # one taken, two on each side
            assert buffer_bytes() - before <= 4 * MAX_CHUNK_BYTES + OF_A_CONNECTION
            ends.receiver.released.set()
            assert await sending == SPEC.handoff_bytes(BLOCKS * SPEC.block_size)

    asyncio.run(scenario())


@pytest.mark.parametrize("port", PORTS)
def test_transfers_that_begin_together_advance_together(port: PortName) -> None:
    """When the first has ended every other one is at least half-way."""
    names = [f"transfer-{index}" for index in range(8)]

    async def scenario() -> None:
        async with joined(port) as ends:
            ends.receiver.released.set()
            sending = [ends.begin(name, BLOCKS // len(names), 4 * SPEC.layer_block_bytes) for name in names]
            await asyncio.gather(*sending)
            taken = ends.receiver.taken
            each = taken.count(names[0])
            first_end = min(len(taken) - taken[::-1].index(name) for name in names)
            assert each >= 12
            assert all(taken[:first_end].count(name) >= each // 2 for name in names)

    asyncio.run(scenario())


@pytest.mark.parametrize("port", PORTS)
def test_transfers_that_are_given_up_leave_their_turn_to_others(port: PortName) -> None:
    """More of them than may hold a chunk at a time, to a receiver that has stopped reading."""

    async def scenario() -> None:
        async with joined(port) as ends:
            sending = {name: ends.begin(name, BLOCKS // 8) for name in map("transfer-{}".format, range(8))}
            await until(lambda: len(ends.receiver.taken) > 1, "several to have begun")
            await ends.give_up(sending)
            for name in ("later", "last"):
                assert await ends.begin(name, BLOCKS) == SPEC.handoff_bytes(BLOCKS * SPEC.block_size)

    asyncio.run(scenario())


@pytest.mark.parametrize("port", PORTS)
def test_a_transfer_ends_beside_stalled_ones(port: PortName) -> None:
    """Over gRPC a stalled one gives its turn back, through shared memory its two slots are replaced."""

    async def scenario() -> None:
        async with joined(port) as ends:
            stalled = {name: ends.begin(name, BLOCKS // 8) for name in map("stalled-{}".format, range(6))}
            await until(lambda: set(ends.receiver.taken) == set(stalled), "all of them to have begun")
            live = ends.begin(LIVE, BLOCKS // 8)
            assert await asyncio.wait_for(live, 20) == SPEC.handoff_bytes(BLOCKS // 8 * SPEC.block_size)
            assert not any(task.done() for task in stalled.values())
            await ends.give_up(stalled)

    asyncio.run(scenario())
