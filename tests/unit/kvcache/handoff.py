"""Both ends of one handoff in one process, without a connection between them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from kvcache.errors import TransferError
from kvcache.lease import BlockLease
from kvcache.manager import KVCacheManager
from kvcache.storage import PagedStorage
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.receiver import IncomingTransfer, ReceivedKV
from kvcache.transfer.sender import OutgoingTransfer, PrefillOutcome, TransferTarget
from kvcache.transfer.wire import Chunk, ChunkRange, Message, decode_message, encode_message, make_chunk
from tests.builders import fill_with_noise, make_spec

# A MiB per layer and block: with three blocks the sender makes chunks of two blocks, and one of the two layers' third.
SPEC = make_spec(num_layers=2, num_kv_heads=2, head_size=512, block_size=128)
NUM_TOKENS = 2 * 128 + 5  # three blocks
NUM_BLOCKS = 6
LEASE_TTL_S = 10.0
FIRST_TOKEN_ID = 42
NUM_CACHED_TOKENS = 128
REQUEST_ID = "request"
BYSTANDER = "bystander"


@cache
def noisy_storage(seed: int) -> PagedStorage:
    """Made once, for drawing takes longer than the tests. Do not change it."""
    storage = PagedStorage(SPEC, NUM_BLOCKS)
    fill_with_noise(storage, seed)
    return storage


class Side:
    """One worker's cache."""

    def __init__(self, seed: int, bystander_blocks: int, device: str) -> None:
        """The bystander's blocks come first, so the request's blocks have other numbers on each side."""
        self.manager = KVCacheManager(SPEC, NUM_BLOCKS, LEASE_TTL_S)
        self.storage = PagedStorage(SPEC, NUM_BLOCKS, device)
        for layer, noise in zip(self.storage.layers, noisy_storage(seed).layers, strict=True):
            layer.copy_(noise)
        self.manager.extend(BYSTANDER, bystander_blocks * SPEC.block_size)
        self.manager.extend(REQUEST_ID, NUM_TOKENS)

    def read(self, request_id: str) -> list[bytes]:
        """The sequence's KV, layer by layer, in logical order."""
        table = self.manager.block_table(request_id)
        return [bytes(self.storage.read_blocks(layer, table)) for layer in range(SPEC.num_layers)]


class Handoff:
    """A prefilled sequence on ``source``, blocks reserved on ``target``, and the messages between them.

    The target holds the first ``num_held`` blocks of the prompt already.
    """

    def __init__(self, num_held: int = 0, source_device: str = "cpu", target_device: str = "cpu") -> None:
        self.num_held = num_held
        self.source = Side(seed=1, bystander_blocks=1, device=source_device)
        self.target = Side(seed=2, bystander_blocks=2, device=target_device)
        self.expected = self.source.read(REQUEST_ID)
        self.bystander_before = self.target.read(BYSTANDER)
        self.source_lease = self._open_lease(self.source)
        self.source.manager.leases.start_sending(self.source_lease)
        self.target_lease = self._open_lease(self.target)
        self.messages = [decode_message(encode_message(message)) for message in self.iter_messages()]

    @property
    def opening(self) -> pb.TransferOpen:
        (opening,) = (message for message in self.messages if isinstance(message, pb.TransferOpen))
        return opening

    @property
    def chunks(self) -> list[Chunk]:
        return [message for message in self.messages if isinstance(message, Chunk)]

    @property
    def commit(self) -> pb.TransferCommit:
        (commit,) = (message for message in self.messages if isinstance(message, pb.TransferCommit))
        return commit

    def iter_messages(self) -> Iterable[Message]:
        """Of a prompt that is computed as a whole already."""
        transfer = self.outgoing()
        transfer.complete(PrefillOutcome(FIRST_TOKEN_ID, NUM_CACHED_TOKENS))
        while (message := transfer.next_message()) is not None:
            yield message

    def outgoing(self) -> OutgoingTransfer:
        target = TransferTarget("nowhere:1", self.target_lease.transfer_id, self.target_lease.epoch)
        return OutgoingTransfer(self.source.storage, self.source_lease, target)

    def make_chunk(self, index: int, where: ChunkRange, payload: bytes | memoryview) -> Chunk:
        """A chunk with the right checksum, whatever it says."""
        lease = self.target_lease
        return make_chunk(lease.transfer_id, lease.epoch, index, where, payload)

    def receive(self, now: float = 0.0) -> IncomingTransfer:
        return IncomingTransfer(self.target.manager, self.target.storage, self.opening, now)

    def feed(self, incoming: IncomingTransfer, kind: str, now: float = 0.0) -> None:
        """Feeds the first chunk or the commit."""
        if kind == "chunk":
            incoming.write(self.chunks[0], now)
        else:
            incoming.commit(self.commit, now)

    def deliver(self, now: float = 0.0) -> ReceivedKV:
        """Feeds all messages in order, as a port does, which aborts the lease on any fault."""
        try:
            incoming = self.receive(now)
            for chunk in self.chunks:
                incoming.write(chunk, now)
            return incoming.commit(self.commit, now)
        except TransferError:
            self.target.manager.leases.abort(self.target_lease)
            raise

    def end(self) -> None:
        """What the roles do in the end, whatever happened."""
        for side, lease in ((self.source, self.source_lease), (self.target, self.target_lease)):
            side.manager.leases.abort(lease)
            side.manager.free(REQUEST_ID)
            side.manager.free(BYSTANDER)

    def _open_lease(self, side: Side) -> BlockLease:
        block_ids = side.manager.block_table(REQUEST_ID)[self.num_held :]
        return side.manager.leases.open(
            "transfer", REQUEST_ID, block_ids, now=0.0, first_block=self.num_held, num_tokens=NUM_TOKENS
        )
