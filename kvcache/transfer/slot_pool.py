"""The slots that a sender's transfers to one receiver share."""

from __future__ import annotations

import os

from kvcache.transfer.slot_ring import MAX_SLOTS, SlotRing
from kvcache.transfer.turns import Turns

NUM_SLOTS = 4  # in use: so few that they stay in the processor's caches, however many transfers there are
SLOTS_PER_TRANSFER = 2  # one is filled while the other is taken


class SlotPool:
    """``turns`` says whose which slot is; the one that was free last, which is in the caches, is taken first.

    A slot may be given back only when the receiver will not look into it any more: what it has verified it then
    copies, and that must still be the same. Those that a stalled receiver keeps are replaced, out of memory that is
    not touched before. Belongs to one event loop.
    """

    def __init__(self, slot_bytes: int) -> None:
        """
        Raises:
            OSError: there is no memory.
        """
        self._ring, self.descriptor = SlotRing.create(slot_bytes, MAX_SLOTS)
        self.slots = self._ring.slots
        self.turns = Turns(NUM_SLOTS, MAX_SLOTS - NUM_SLOTS)
        self._num_users = 0

    @property
    def has_others(self) -> bool:
        """More than one transfer uses this."""
        return self._num_users > 1

    def join(self) -> None:
        """One more transfer uses this."""
        self._num_users += 1

    def leave(self) -> bool:
        """Called once for each ``join``. True: that was the last one, and the memory is gone."""
        self._num_users -= 1
        if self._num_users == 0:
            os.close(self.descriptor)
            self._ring.close()
        return self._num_users == 0
