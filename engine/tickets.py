"""Names that clients give to their requests, so that they can ask for their place in line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engine.outputs import Origin


@dataclass(slots=True, eq=False)
class Ticket:
    """One sequence under way."""

    request_id: str = ""  # its newest id at the scheduler


class Tickets:
    """Sequences under way by tenant and name. A name is no secret and no key: it opens nothing but this."""

    def __init__(self) -> None:
        self._tickets: dict[tuple[str, str], list[Ticket]] = {}

    @contextmanager
    def held(self, origin: Origin) -> Iterator[Ticket]:
        """From a sequence's beginning to its end, whichever that is."""
        ticket = Ticket()
        if origin.ticket is None:
            yield ticket
            return
        key = (origin.tenant, origin.ticket)
        held = self._tickets.setdefault(key, [])
        held.append(ticket)
        try:
            yield ticket
        finally:
            held.remove(ticket)
            if not held and self._tickets.get(key) is held:
                del self._tickets[key]

    def request_ids(self, tenant: str, name: str) -> list[str]:
        return [ticket.request_id for ticket in self._tickets.get((tenant, name), ())]
