"""The handoff within one process, for tests: the same messages, without a connection between the two ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from kvcache.errors import TransferError, TransferFault
from kvcache.transfer.port import Outlet, Patience
from kvcache.transfer.receiver import KVReceiver
from kvcache.transfer.sender import OutgoingTransfer
from kvcache.transfer.wire import Message


class InProcessPort:
    """A ``KVPort`` to the receivers in ``receivers``, by address. They run on the sender's event loop."""

    def __init__(self, receivers: dict[str, KVReceiver]) -> None:
        self._receivers = receivers

    async def open(self, transfer: OutgoingTransfer, on_end: Callable[[], None]) -> Outlet:
        """See ``KVPort``."""
        receiver = self._receivers.get(transfer.target.address)
        if receiver is None:
            raise TransferError(TransferFault.PEER_LOST, f"no receiver at {transfer.target.address} in this process")
        return _InProcessOutlet(receiver, on_end)


class _InProcessOutlet:
    """Holds one message; the next has to wait until the receiver takes it."""

    def __init__(self, receiver: KVReceiver, on_end: Callable[[], None]) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
        self._receiving = asyncio.create_task(self._receive(receiver))
        self._receiving.add_done_callback(lambda _: on_end())

    @property
    def has_ended(self) -> bool:
        return self._receiving.done()

    async def slot(self, patience: Patience) -> None:
        """Anywhere will do."""

    async def put(self, message: Message) -> None:
        putting = asyncio.ensure_future(self._messages.put(message))
        try:
            await asyncio.wait({putting, self._receiving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            putting.cancel()

    async def receipt(self) -> int:
        return await asyncio.shield(self._receiving)

    def close(self) -> None:
        self._receiving.cancel()

    async def _receive(self, receiver: KVReceiver) -> int:
        return (await receiver.receive(self._iterate())).payload_bytes

    async def _iterate(self) -> AsyncIterator[Message]:
        while True:
            yield await self._messages.get()
