"""What a port is: a way by which a handoff's messages reach another worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.wire import Chunk, Message


class Outlet(Protocol):
    """One handoff's way to its receiver, from its opening to its receipt. Used by one task."""

    @property
    def has_ended(self) -> bool:
        """The other side has ended the handoff, well or not; ``receipt`` tells how."""
        ...

    async def slot(self) -> memoryview | None:
        """Waits until a chunk may be made. Its payload has to be put into the memory that is returned; None: anywhere.

        The chunk has to be put before anything else is awaited. Returns at once when ``has_ended``.
        """
        ...

    async def put(self, message: Message) -> None:
        """Returns when the next message may come. Does nothing when ``has_ended``."""
        ...

    async def receipt(self) -> int:
        """Waits for the other side's word and returns the payload bytes that it has verified and attached.

        Raises:
            TransferError: refused, or the other side was lost.
        """
        ...

    def close(self) -> None:
        """Gives everything back; ends the handoff if it has not ended."""
        ...


class KVPort(Protocol):
    """Belongs to one event loop."""

    async def open(self, transfer: OutgoingTransfer, on_end: Callable[[], None]) -> Outlet:
        """A way to the transfer's target; the caller closes it. ``on_end`` is called when the other side ends it.

        Raises:
            TransferError: there is none.
        """
        ...


async def send_kv(port: KVPort, transfer: OutgoingTransfer, stall_timeout_s: float) -> int:
    """Sends a transfer's messages as they come and waits until the other side has verified and attached them.

    The caller owns the source lease and may free the blocks when this returns. Waits as long as the computing
    takes; gives up when the other side takes nothing for ``stall_timeout_s``. Returns the payload bytes.

    Raises:
        TransferError: refused, broken, or the lease ended; the other side will not use what it got.
    """
    try:
        async with asyncio.timeout(stall_timeout_s):
            outlet = await port.open(transfer, transfer.changed.set)
        try:
            sent_bytes = await _put_all(outlet, transfer, stall_timeout_s)
            async with asyncio.timeout(stall_timeout_s):
                acknowledged = await outlet.receipt()
        finally:
            outlet.close()
    except TimeoutError:
        raise TransferError(
            TransferFault.EXPIRED,
            f"the receiver took nothing of transfer {transfer.target.transfer_id} for {stall_timeout_s:g} s",
        ) from None
    if acknowledged != sent_bytes:
        raise TransferError(TransferFault.INCOMPLETE, f"sent {sent_bytes} bytes, {acknowledged} acknowledged")
    return sent_bytes


async def _put_all(outlet: Outlet, transfer: OutgoingTransfer, stall_timeout_s: float) -> int:
    """Returns the payload bytes, when all was put or the other side has ended."""
    sent_bytes = 0
    while not transfer.is_finished:
        async with asyncio.timeout(stall_timeout_s):
            slot = await outlet.slot()
            if outlet.has_ended:
                break
            message = transfer.next_message(slot)
            if message is not None:
                await outlet.put(message)
        if message is None:
            await transfer.changed.wait()  # set by ``on_end`` too: an early end is noticed while nothing is ready
            transfer.changed.clear()
        elif isinstance(message, Chunk):
            sent_bytes += len(message.payload)
    return sent_bytes
