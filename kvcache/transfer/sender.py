"""The prefill side of a handoff: cuts the blocks of one sequence into messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvcache.errors import TransferError, TransferFault
from kvcache.lease import BlockLease
from kvcache.storage import PagedStorage
from kvcache.transfer import kv_transfer_pb2 as pb
from kvcache.transfer.wire import make_chunk, make_commit, plan_chunks, spec_to_wire


@dataclass(frozen=True, slots=True)
class TransferTarget:
    """Where a handoff goes. Made by the decode worker that reserved the blocks."""

    address: str  # host:port of its KVTransfer service
    transfer_id: str
    epoch: int


def transfer_messages(
    storage: PagedStorage, lease: BlockLease, target: TransferTarget, first_token_id: int
) -> Iterator[pb.TransferMessage]:
    """Yields open, chunks and commit, copying one chunk at a time out of the cache.

    The consumer takes the next message when the connection has room, so at most one chunk is held here.

    Raises:
        TransferError: the lease on the source blocks ended meanwhile, so they may not be read any more.
    """
    spec = storage.spec
    yield pb.TransferMessage(
        open=pb.TransferOpen(
            transfer_id=target.transfer_id,
            epoch=target.epoch,
            spec=spec_to_wire(spec),
            num_blocks=len(lease.block_ids),
        )
    )
    num_chunks = 0
    for chunk in plan_chunks(spec, len(lease.block_ids)):
        if not lease.is_open:
            raise TransferError(TransferFault.ABORTED, f"the source lease of transfer {target.transfer_id} has ended")
        block_ids = lease.block_ids[chunk.first_block : chunk.first_block + chunk.num_blocks]
        payload = bytes(storage.read_blocks(chunk.layer, block_ids))
        yield pb.TransferMessage(chunk=make_chunk(target.transfer_id, target.epoch, chunk, payload))
        num_chunks += 1
    yield pb.TransferMessage(commit=make_commit(target.transfer_id, target.epoch, num_chunks, first_token_id))
