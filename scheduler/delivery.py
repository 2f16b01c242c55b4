"""Brings the answers about requests to whoever asked, also those that come out of somebody else's events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scheduler.events import Command, Event, PlaceRequest, RefuseRequest, RequestArrived, RequestEnded, RequestQueued


class EventHandler(Protocol):
    """What ``scheduler.admission.AdmissionControl`` offers."""

    def handle(self, event: Event, now: float) -> list[Command]: ...

    def advance(self, now: float) -> list[Command]: ...


class Delivery:
    """Each caller gets the answers to its events, and with any of its calls what was decided since of its requests.

    A caller with waiting requests therefore calls every few milliseconds. Most of its waiting ends in its own calls:
    what makes room for a request is mostly the end of another of the same gateway.
    """

    def __init__(self, handler: EventHandler) -> None:
        self._handler = handler
        self._askers: dict[str, str] = {}  # of requests that wait
        self._mail: dict[str, dict[str, Command]] = {}  # by asker and request

    def handle(self, events: Sequence[Event], asker: str, now: float) -> list[list[Command]]:
        """The commands that follow from each event, in order.

        With an ``asker``, a name that is the caller's own, one list more: what was decided of its earlier requests.
        Without one nobody waits for what is decided later.
        """
        answers = [self._answer(event, asker, now) for event in events]
        for command in self._handler.advance(now):
            self._post(command)
        return [*answers, [*self._mail.pop(asker, {}).values()]] if asker else answers

    def _answer(self, event: Event, asker: str, now: float) -> list[Command]:
        own_id = event.request_id if isinstance(event, RequestArrived) else None
        if isinstance(event, RequestEnded):
            self._askers.pop(event.request_id, None)
            self._mail.get(asker, {}).pop(event.request_id, None)  # it may be asked for anew, in the same call even
        answers: list[Command] = []
        for command in self._handler.handle(event, now):
            request_id = request_of(command)
            if request_id is None:
                answers.append(command)
            elif request_id == own_id:
                answers.append(command)
                if asker and isinstance(command, RequestQueued):
                    self._askers[request_id] = asker
                else:
                    self._askers.pop(request_id, None)
            else:
                self._post(command)
        return answers

    def _post(self, command: Command) -> None:
        """For whoever waits for it, with its next call."""
        request_id = request_of(command) or ""
        asker = self._askers.pop(request_id, None)
        if asker is not None:
            self._mail.setdefault(asker, {})[request_id] = command


def request_of(command: Command) -> str | None:
    """The id of the request that is answered; None: it is no answer to a request."""
    match command:
        case PlaceRequest():
            return command.placement.request_id
        case RefuseRequest() | RequestQueued():
            return command.request_id
    return None
