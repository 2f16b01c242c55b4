"""What a port is: a way by which a handoff's messages reach another worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.wire import Chunk, Message

STALL_S = 0.1  # a receiver that takes nothing for so long is not waited for by others' handoffs


class Patience(Protocol):
    """With a receiver that takes nothing of a handoff."""

    def renew(self) -> None:
        """It has taken something, or could not have until now."""
        ...

    def suspend(self) -> None:
        """Until the next ``renew`` nothing is for it to take."""
        ...


class Outlet(Protocol):
    """One handoff's way to its receiver, from its opening to its receipt. Used by one task."""

    @property
    def has_ended(self) -> bool:
        """The other side has ended the handoff, well or not; ``receipt`` tells how."""
        ...

    async def slot(self, patience: Patience) -> memoryview | None:
        """Waits until a chunk may be made. Its payload has to be put into the memory that is returned; None: anywhere.

        Asked for when a message can be made, which has to be put before anything else is awaited. Returns at once
        when ``has_ended``. While others' handoffs are before this one ``patience`` is suspended: that is not this
        receiver's fault.
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
    takes, and as others' handoffs go before this one; gives up when the other side takes nothing for
    ``stall_timeout_s`` (and at most an eighth of it more).
    Returns the payload bytes.

    Raises:
        TransferError: refused, broken, or the lease ended; the other side will not use what it got.
    """
    try:
        async with asyncio.timeout(stall_timeout_s) as timeout:
            patience = _Timer(timeout, stall_timeout_s)
            outlet = await port.open(transfer, transfer.changed.set)
            try:
                sent_bytes = await _put_all(outlet, transfer, patience)
                patience.renew()
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


class _Timer:
    """``Patience`` with one timer for all messages of a transfer; to set one for each costs as much as to frame it."""

    def __init__(self, timeout: asyncio.Timeout, stall_timeout_s: float) -> None:
        self._timeout = timeout
        self._stall_timeout_s = stall_timeout_s
        self._clock = asyncio.get_running_loop().time
        self._renew_at_s = 0.0

    def renew(self) -> None:
        now_s = self._clock()
        if now_s >= self._renew_at_s:
            self._renew_at_s = now_s + self._stall_timeout_s / 8
            self._timeout.reschedule(self._renew_at_s + self._stall_timeout_s)

    def suspend(self) -> None:
        self._renew_at_s = 0.0
        self._timeout.reschedule(None)


async def _put_all(outlet: Outlet, transfer: OutgoingTransfer, patience: Patience) -> int:
    """Returns the payload bytes, when all was put or the other side has ended."""
    sent_bytes = 0
    while not transfer.is_finished:
        if not transfer.has_message:
            patience.suspend()
            await transfer.changed.wait()  # set by ``on_end`` too: an early end is noticed while nothing is ready
            transfer.changed.clear()
        patience.renew()
        if not outlet.has_ended and not transfer.has_message:
            continue
        sent_bytes += await _put_next(outlet, transfer, patience)
        if outlet.has_ended:
            break
    return sent_bytes


async def _put_next(outlet: Outlet, transfer: OutgoingTransfer, patience: Patience) -> int:
    """Returns the payload bytes of the next message, of which nothing is kept here while the one after it waits."""
    slot = await outlet.slot(patience)
    if outlet.has_ended:
        return 0
    message = transfer.next_message(slot)
    assert message is not None, "what can be sent is only sent here"
    await outlet.put(message)
    return len(message.payload) if isinstance(message, Chunk) else 0
