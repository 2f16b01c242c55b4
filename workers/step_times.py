"""What steps and handoffs took, added up between two heartbeats for the scheduler's cost model."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.step_plan import ScheduledChunk
from scheduler.step_times import step_times
from scheduler.types import StepTimes, TransferTimes

MAX_KINDS = 16  # of steps in one heartbeat; of more kinds the rarest are left out


class StepLedger:
    """Steps by their kind: how many prompt tokens and decoding sequences they have, to a factor of two."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, int], StepTimes] = {}

    def add(self, chunks: Iterable[ScheduledChunk], seconds: float) -> None:
        step = step_times(chunks, seconds)
        kind = (step.prompt_tokens.bit_length(), step.decode_tokens.bit_length())
        known = self._kinds.get(kind)
        self._kinds[kind] = step if known is None else _sum(known, step)

    def take(self) -> tuple[StepTimes, ...]:
        """All since the last call."""
        kinds, self._kinds = self._kinds, {}
        return tuple(sorted(kinds.values(), key=lambda kind: -kind.num_steps)[:MAX_KINDS])


def _sum(one: StepTimes, other: StepTimes) -> StepTimes:
    return StepTimes(
        one.num_steps + other.num_steps,
        one.prompt_tokens + other.prompt_tokens,
        one.prompt_pairs + other.prompt_pairs,
        one.decode_tokens + other.decode_tokens,
        one.context_tokens + other.context_tokens,
        one.seconds + other.seconds,
    )


class TransferLedger:
    """Handoffs by the worker that they went to."""

    def __init__(self) -> None:
        self._receivers: dict[str, TransferTimes] = {}

    def add(self, address: str, num_bytes: int, seconds: float) -> None:
        known = self._receivers.get(address, TransferTimes(address, 0, 0, 0.0))
        self._receivers[address] = TransferTimes(
            address, known.num_transfers + 1, known.num_bytes + num_bytes, known.seconds + seconds
        )

    def take(self) -> tuple[TransferTimes, ...]:
        """All since the last call."""
        receivers, self._receivers = self._receivers, {}
        return tuple(receivers.values())
