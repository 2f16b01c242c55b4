"""Who goes before whom, on a worker and in the controller's queue alike."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvcache.errors import RequestError
from scheduler.messages import message

MAX_PRIORITY = 1_000_000


class ServiceClass(StrEnum):
    """What a request may expect. Listed first to last: ``rank`` says so, nothing else depends on the order."""

    INTERACTIVE = "interactive"  # somebody waits for the answer
    BATCH = "batch"  # fills what interactive requests leave, and is preempted for them

    @property
    def rank(self) -> int:
        return int(self is not ServiceClass.INTERACTIVE)


@message
@dataclass(frozen=True, slots=True)
class Urgency:
    """The class goes first, then the priority; among equals the order of arrival decides."""

    service_class: ServiceClass = ServiceClass.INTERACTIVE
    priority: int = 0  # lower first, as in vLLM

    @property
    def key(self) -> tuple[int, int]:
        """Sorts first to last."""
        return self.service_class.rank, self.priority

    @property
    def is_batch(self) -> bool:
        return self.service_class is ServiceClass.BATCH


ORDINARY = Urgency()


def check_priority(priority: int) -> None:
    """The same at the HTTP edge and at the gRPC edge.

    Raises:
        RequestError: out of bounds.
    """
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise RequestError(
            f"priority is {priority}; it must be between -{MAX_PRIORITY} and {MAX_PRIORITY}.", "priority"
        )
