"""What the scheduler books on each worker, and predicts from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import exp, frexp
from typing import Protocol

from scheduler.types import (
    ACTIVE,
    Duty,
    DutyState,
    Phase,
    PredictionErrors,
    WorkerAddress,
    WorkerInfo,
    WorkerLoad,
    WorkerRole,
    WorkerSnapshot,
)

HEARTBEAT_INTERVAL_S = 0.5  # of a worker that was not told otherwise
ARRIVALS_MEMORY_S = 30.0
_PREFILL = WorkerRole.PREFILL  # members of an enumeration are slow to get


class CostPredictor(Protocol):
    """What placing asks of ``scheduler.cost_model.CostModel``. All in seconds."""

    def prefill_seconds(
        self, worker_id: str, num_tokens: int, num_cached_tokens: int = 0, neighbours: float | None = None
    ) -> float: ...

    def decode_step_seconds(
        self, worker_id: str, batch_size: int, context_tokens: int, neighbours: float | None = None
    ) -> float: ...

    def transfer_seconds(self, prefill_id: str, decode_id: str, num_tokens: int) -> float: ...


class Workload:
    """What one request brings to the workers it is placed on. Do not change it.

    Args:
        num_output_tokens: expected.
        prefill_s: predicted, on the worker that prefills.
        is_batch: it gives way to interactive ones.
    """

    __slots__ = (
        "context_tokens",
        "is_batch",
        "max_tokens",
        "num_output_tokens",
        "num_prompt_tokens",
        "prefill_s",
        "size",
    )

    def __init__(
        self,
        num_prompt_tokens: int,
        max_tokens: int,
        num_output_tokens: int,
        prefill_s: float,
        *,
        is_batch: bool = False,
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.num_output_tokens = num_output_tokens
        self.prefill_s = prefill_s
        self.is_batch = is_batch
        self.context_tokens = num_prompt_tokens + num_output_tokens // 2  # mean over its life in the batch
        self.size = frexp(prefill_s)[1]  # prompts of one size take as long as each other, to a factor of two


@dataclass(slots=True)
class _Queued:
    """Prompts of about one size that were placed on a worker and whose first token is not out."""

    count: int = 0
    seconds: float = 0.0  # predicted


@dataclass(slots=True, eq=False)
class WorkerState:
    """One process of one worker. Changed by its methods only; whoever calls them tells the ``WorkerTable``.

    Prompts are computed in the order in which they were placed, more or less. So the work ahead is kept as the time
    ``free_at_s`` at which it would be done: it shrinks as time passes without anybody counting, and workers stay
    in their order while nothing happens to them.
    """

    info: WorkerInfo
    load: WorkerLoad
    last_heard_s: float
    duty: Duty = ACTIVE  # changed by ``assign``, with the role
    rest_of_step_s: float = 0.0  # mean, of the longest step of prompts, when another prompt arrives
    requests_in_flight: int = 0
    tokens_in_flight: int = 0
    requests_placed: int = 0
    num_prefills: int = 0  # prompts placed here whose first token is not out
    prefill_s: float = 0.0  # their predicted seconds
    free_at_s: float = 0.0
    queued: dict[int, _Queued] = field(default_factory=dict)  # the same prompts by size: seconds to a power of two
    num_decodes: int = 0
    context_tokens: int = 0  # of them
    num_batch: int = 0  # those of them that give way to interactive ones
    batch_tokens: int = 0  # of their contexts
    num_awaited: int = 0  # those of them whose first token is not out
    awaited_tokens: int = 0  # of their contexts
    ends_s: float = 0.0  # when the others of them will have ended, as predicted at their first tokens, added up
    arrivals: float = 0.0  # of sequences to decode, each counting exp(-age / ARRIVALS_MEMORY_S)
    arrived_s: float = 0.0  # the newest of them
    # Predicted, and kept by a policy that asks for it:
    step_s: float = 0.0  # of a decode step of its batch as it is
    joined_step_s: float = 0.0  # of one with a sequence more, whose context is still to be counted
    heartbeat_s: float = HEARTBEAT_INTERVAL_S  # how often it was told to report
    num_foreign: int = 0  # sequences it reports that were not placed from here: of another gateway, or forgotten

    # Of ``info``, at hand for every placement:
    address: WorkerAddress = field(init=False)
    role: WorkerRole = field(init=False)
    max_tokens: int = field(init=False)  # how many tokens' KV there is room for
    worker_id: str = field(init=False)
    price_per_hour: float = field(init=False)
    is_active: bool = field(init=False)  # by its duty

    batch_size: int = 0  # sequences that decode here, or will when their prompts are computed
    batch_context_tokens: int = 0  # of them

    def __post_init__(self) -> None:
        info = self.info
        self.address = WorkerAddress(info.worker_id, info.address)
        self.role = info.role
        self.max_tokens = info.num_blocks * info.spec.block_size
        self.worker_id = info.worker_id
        self.price_per_hour = info.device.price_per_hour
        self.is_active = self.duty.state is DutyState.ACTIVE

    def _count_batch(self) -> None:
        """After any change of what it is counted from: it is asked for more often than it changes."""
        self.batch_size = self.num_decodes + self.num_foreign if self.role is not _PREFILL else 0
        self.batch_context_tokens = self.context_tokens
        if self.num_foreign and self.num_decodes:  # foreign ones are taken to be like the others
            self.batch_context_tokens = self.context_tokens * self.batch_size // self.num_decodes

    @property
    def decoding_size(self) -> int:
        """Sequences that decode here now."""
        return self.batch_size - self.num_awaited

    @property
    def decoding_context_tokens(self) -> int:
        return self.batch_context_tokens - self.awaited_tokens

    @property
    def is_computing(self) -> bool:
        """A prompt, or sequences that decode here: of those that were placed from here."""
        return self.num_prefills > 0 or self.num_decodes > self.num_awaited

    def has_room(self, num_tokens: int) -> bool:
        """Whether one more sequence of so many tokens could begin to decode here and now."""
        return self.batch_size < self.info.max_num_seqs and self.batch_context_tokens + num_tokens <= self.max_tokens

    def takes(self, phase: Phase) -> bool:
        return self.is_active and self.role.takes(phase)

    def assign(self, duty: Duty, role: WorkerRole) -> None:
        """For ``scheduler.duties``, which takes the worker out of its table meanwhile."""
        self.duty = duty
        self.is_active = duty.state is DutyState.ACTIVE
        self.role = role
        self.info = replace(self.info, role=role)
        self._count_batch()

    def backlog_s(self, now: float, prefill_s: float) -> float:
        """Predicted seconds until a prompt placed now, which takes ``prefill_s`` itself, would be begun.

        Shorter ones go before it and longer ones behind, as in ``scheduler.batching``, to a factor of two; of a longer
        one it waits for the step that runs.
        """
        backlog_s = self.free_at_s - now
        if backlog_s <= 0.0:
            return 0.0
        size = frexp(prefill_s)[1]
        ahead_s = 0.0
        for each, queued in self.queued.items():
            if each <= size:
                ahead_s += queued.seconds
        ahead_s += self.rest_of_step_s
        return backlog_s if backlog_s < ahead_s else ahead_s

    def begin_prefill(self, work: Workload, now: float) -> None:
        """A prompt joins the queue."""
        # When the oldest is late all behind it are still to come, whatever was predicted.
        behind_s = self.prefill_s * (self.num_prefills - 1) / self.num_prefills if self.num_prefills else 0.0
        self.free_at_s = max(self.free_at_s, now + behind_s) + work.prefill_s
        self.num_prefills += 1
        self.prefill_s += work.prefill_s
        size = work.size
        queued = self.queued.get(size)
        if queued is None:
            queued = self.queued[size] = _Queued()
        queued.count += 1
        queued.seconds += work.prefill_s

    def end_prefill(self, work: Workload, now: float) -> None:
        """Its first token is out, or it will never be: what is left is what was placed after it."""
        self.num_prefills -= 1
        self.prefill_s = self.prefill_s - work.prefill_s if self.num_prefills else 0.0
        done_s = now + self.prefill_s
        if done_s < self.free_at_s:
            self.free_at_s = done_s
        size = work.size
        queued = self.queued[size]
        queued.count -= 1
        queued.seconds -= work.prefill_s
        if not queued.count:
            del self.queued[size]

    def begin_decode(self, work: Workload, now: float) -> None:
        """A sequence is placed here; its first token is still to come."""
        self.num_decodes += 1
        self.context_tokens += work.context_tokens
        if work.is_batch:
            self.num_batch += 1
            self.batch_tokens += work.context_tokens
        self.num_awaited += 1
        self.awaited_tokens += work.context_tokens
        self.arrivals = self.arrivals_at(now) + 1
        self.arrived_s = now
        self._count_batch()

    def first_token(self, work: Workload, end_s: float) -> None:
        """Of a sequence that decodes here until ``end_s``, or that will never be."""
        self.num_awaited -= 1
        self.awaited_tokens -= work.context_tokens
        self.ends_s += end_s

    def end_decode(self, work: Workload, end_s: float) -> None:
        """``end_s``: as it was said with its first token."""
        self.num_decodes -= 1
        self.context_tokens -= work.context_tokens
        if work.is_batch:
            self.num_batch -= 1
            self.batch_tokens -= work.context_tokens
        self.ends_s = self.ends_s - end_s if self.num_decodes > self.num_awaited else 0.0
        self._count_batch()

    def arrivals_at(self, now: float) -> float:
        return self.arrivals * exp((self.arrived_s - now) / ARRIVALS_MEMORY_S)

    def others_beside(self, now: float, begin_s: float, seconds: float) -> float:
        """How many decode here on average beside a sequence that will do so from ``begin_s`` on, for some ``seconds``.

        docs/cost_model.md has an example. Those that decode now stay until their predicted end, on average. Those whose
        prompts are before its own come over the second half of its wait, for prompts are computed several at once.
        Others come later, as many as come mostly, and are there for half of its time on average.
        """
        num_decoding = self.num_decodes - self.num_awaited
        stay = 0.0
        if num_decoding > 0:
            stay = min(1.0, max(0.0, self.ends_s / num_decoding - begin_s) / seconds)
        before = _mean_overlap((begin_s - now) / 2, seconds)
        come = self.arrivals_at(now) / ARRIVALS_MEMORY_S * seconds / 2
        return num_decoding * stay + self.num_awaited * before + come + self.num_foreign

    def begin_request(self, num_tokens: int) -> None:
        self.requests_in_flight += 1
        self.requests_placed += 1
        self.tokens_in_flight += num_tokens

    def end_request(self, num_tokens: int) -> None:
        self.requests_in_flight -= 1
        self.tokens_in_flight -= num_tokens

    def hear(self, load: WorkerLoad, now: float) -> None:
        """A heartbeat: corrects the books by what the worker itself counts."""
        self.load = load
        self.last_heard_s = now
        self.num_foreign = max(0, load.running + load.waiting - self.requests_in_flight)
        self._count_batch()
        if self.num_prefills:
            mean_s = self.prefill_s / self.num_prefills
            waiting_s = mean_s * min(load.waiting, self.num_prefills - 1 + self.num_foreign)
            self.free_at_s = max(self.free_at_s, now + waiting_s)

    def snapshot(self, errors: PredictionErrors) -> WorkerSnapshot:
        return WorkerSnapshot(
            self.info,
            self.load,
            self.requests_in_flight,
            self.tokens_in_flight,
            self.requests_placed,
            self.last_heard_s,
            errors,
            self.prefill_s,
            self.duty,
        )


def _mean_overlap(spread_s: float, seconds: float) -> float:
    """How much of the next ``seconds`` is shared with what began evenly over the time before, and lasts as long."""
    return 1 - spread_s / (2 * seconds) if spread_s < seconds else seconds / (2 * spread_s)
