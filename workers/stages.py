"""How long one sequence was in each stage: what answers "why is it slow"."""

from __future__ import annotations

from enum import StrEnum

from workers import worker_pb2 as pb


class Stage(StrEnum):
    """In the order of a request's life. The value is the metric label, and a field of ``StageSeconds``."""

    QUEUE_DECODE = "queue_decode"  # until the decode worker has reserved blocks
    QUEUE_PREFILL = "queue_prefill"  # until a step takes the first of the prompt
    PREFILL = "prefill"  # until the first token is sampled
    TRANSFER = "transfer"  # until it and all KV are on the decode worker: what computing has not hidden
    FIRST_DECODE = "first_decode"  # until the second token
    DECODE = "decode"  # until the last


class StageClock:
    """Of one sequence, on the worker that decodes it. Times are monotonic seconds of its clock; of the prefill worker,
    which has another, come durations."""

    def __init__(self, now: float) -> None:
        self._arrived_s = now
        self._reserved_s: float | None = None  # blocks, for a handoff
        self._prompt: pb.PromptSeconds | None = None  # on the prefill worker
        self._begun_s: float | None = None  # the prompt, here
        self._token_s: list[float] = []  # the first token, the second, and the last

    def reserve(self, now: float) -> None:
        """Blocks are there, and a prefill worker is asked."""
        self._reserved_s = now

    def take_prompt(self, seconds: pb.PromptSeconds) -> None:
        """What the prefill worker says."""
        self._prompt = seconds

    def token(self, now: float, begun_s: float | None) -> None:
        """A token is out. ``begun_s``: when this worker's first step with the sequence began."""
        if not self._token_s:
            self._begun_s = begun_s  # of one that came by handoff no step was until now
        self._token_s = [*self._token_s[:2], now]

    def seconds(self) -> pb.StageSeconds:
        """The stages that the sequence went through, as far as they are known."""
        told = pb.StageSeconds()
        first_s, *later_s = self._token_s
        if self._begun_s is not None:
            told.queue_prefill = self._begun_s - (self._reserved_s or self._arrived_s)
            told.prefill = first_s - self._begun_s
        elif self._reserved_s is not None and self._prompt is not None:
            told.queue_prefill, told.prefill = self._prompt.queue, self._prompt.compute
            told.transfer = max(0.0, first_s - self._reserved_s - self._prompt.queue - self._prompt.compute)
        if self._reserved_s is not None:
            told.queue_decode = self._reserved_s - self._arrived_s
        if later_s:
            told.first_decode = later_s[0] - first_s
            told.decode = later_s[-1] - later_s[0]
        return told


def seconds_by_stage(told: pb.StageSeconds) -> dict[Stage, float]:
    """Those that were told."""
    return {stage: getattr(told, stage.value) for stage in Stage if told.HasField(stage.value)}
