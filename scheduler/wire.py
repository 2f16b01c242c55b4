"""What is said in one call, pickled flat: Ray's pickler asks Python about every object that is none of its own types.

What there is a thousand of in a second goes as strings and numbers, all else as itself.

==================  =====================================================================================
``PrefillDone``     the request's id
``RequestEnded``    its fields
``RequestArrived``  its fields, prefixes as their fields
answers             ``None`` for no command, and for one ``PlaceRequest`` the strings that its placement is made of
==================  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scheduler.events import Command, Event, PlaceRequest, PrefillDone, RequestArrived, RequestEnded
from scheduler.types import Placement, PrefixHashes, WorkerAddress

_ENDED_FIELDS = 3
_Flat = Any  # as the table says


class Events(tuple[Event, ...]):
    """The events of a call. It comes out of a pickle as a tuple."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _events, tuple([_flat_event(each) for each in self])


class Answers(list[list[Command]]):
    """The commands that follow from each event. They come out of a pickle as a list."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _answers, tuple([_flat_answer(each) for each in self])


def _events(*flat: _Flat) -> tuple[Event, ...]:
    return tuple([_event(each) for each in flat])


def _flat_event(event: Event) -> _Flat:
    if isinstance(event, PrefillDone):
        return event.request_id
    if isinstance(event, RequestEnded):
        return event.request_id, event.num_output_tokens, event.num_delivered_tokens
    if isinstance(event, RequestArrived):
        return (
            event.request_id,
            event.num_prompt_tokens,
            event.max_tokens,
            event.avoid,
            event.stay_on,
            tuple([(each.block_size, each.tokens_per_hash, each.hashes) for each in event.prefixes]),
            event.tenant,
            event.urgency,
            event.is_continued,
            event.waited_s,
        )
    return event


def _event(flat: _Flat) -> Event:
    if isinstance(flat, str):
        return PrefillDone(flat)
    if not isinstance(flat, tuple):
        event: Event = flat
        return event
    if len(flat) == _ENDED_FIELDS:
        return RequestEnded(*flat)
    request_id, num_prompt_tokens, max_tokens, avoid, stay_on, prefixes, *rest = flat
    prefixes = tuple([PrefixHashes(*each) for each in prefixes])
    return RequestArrived(request_id, num_prompt_tokens, max_tokens, avoid, stay_on, prefixes, *rest)


def _answers(*flat: _Flat) -> list[list[Command]]:
    return [_answer(each) for each in flat]


def _flat_answer(commands: list[Command]) -> _Flat:
    if not commands:
        return None
    command = commands[0]
    if len(commands) == 1 and isinstance(command, PlaceRequest):
        placement = command.placement
        decode, prefill = placement.decode, placement.prefill
        if prefill is None:
            return placement.request_id, decode.worker_id, decode.address
        return placement.request_id, decode.worker_id, decode.address, prefill.worker_id, prefill.address
    return commands


def _answer(flat: _Flat) -> list[Command]:
    if flat is None:
        return []
    if not isinstance(flat, tuple):
        commands: list[Command] = flat
        return commands
    request_id, decode_id, decode_address, *rest = flat
    prefill = WorkerAddress(*rest) if rest else None
    return [PlaceRequest(Placement(request_id, WorkerAddress(decode_id, decode_address), prefill))]
