"""What is said of a request when it is placed, and how it turned out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from scheduler.cost_model import CostModel
from scheduler.types import Placement, Prediction

MAX_OPEN = 1024
FEWEST_TOKENS = 8  # of an answer that tells how long a token took: shorter ones are all beginning and end


class WorkerBooks(Protocol):
    """What the scheduler has placed on a worker."""

    @property
    def decoding_size(self) -> int:
        """Sequences that decode there now: those whose prompts are still to come join one by one, as others leave."""
        ...

    @property
    def decoding_context_tokens(self) -> int: ...

    def backlog_s(self, now: float) -> float:
        """Predicted seconds until a prompt placed now would be begun."""
        ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one request, in tokens."""

    prompt: int
    output: int  # expected
    cached: int = 0  # of the prompt, where it is computed


def predict(
    costs: CostModel, placement: Placement, sizes: Sizes, prefill: WorkerBooks, decode: WorkerBooks, now: float
) -> Prediction:
    """Before the request is entered in the books. ``prefill`` is ``decode`` for a prompt in place."""
    decode_id = placement.decode.worker_id
    prefill_id = placement.prefill.worker_id if placement.prefill is not None else decode_id
    context = decode.decoding_context_tokens + sizes.prompt + sizes.output // 2
    step_s = costs.decode_step_seconds(decode_id, decode.decoding_size + 1, context)
    ttft_s = prefill.backlog_s(now) + costs.prefill_seconds(prefill_id, sizes.prompt, sizes.cached)
    if placement.prefill is not None:
        ttft_s += costs.transfer_seconds(prefill_id, decode_id, sizes.prompt)
    if decode.decoding_size:
        ttft_s += step_s / 2  # a worker takes up what is new between two steps
    return Prediction(ttft_s + costs.start_seconds(prefill_id), step_s)


@dataclass(slots=True)
class _Open:
    placement: Placement
    prediction: Prediction
    placed_s: float
    first_token_s: float | None = None


class PredictionLog:
    """Compares predictions with what came, for the cost model: of as many requests at once as make a fair sample."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._open: dict[str, _Open] = {}
        self._begun_s: float | None = None  # the newest

    def wants(self, now: float) -> bool:
        """Whether one more shall be compared: of those that come together the first, while there is room."""
        return now != self._begun_s and len(self._open) < MAX_OPEN

    def begin(self, placement: Placement, prediction: Prediction, now: float) -> None:
        self._begun_s = now
        self._open[placement.request_id] = _Open(placement, prediction, now)

    def first_token(self, request_id: str, now: float) -> None:
        request = self._open.get(request_id)
        if request is not None and request.first_token_s is None:
            request.first_token_s = now
            placement = request.placement
            worker_id = (placement.prefill or placement.decode).worker_id
            self._costs.observe_first_token(worker_id, request.prediction.ttft_s, now - request.placed_s)

    def end(self, request_id: str, num_output_tokens: int, now: float) -> None:
        """``num_output_tokens``: of one that finished; 0 says nothing."""
        request = self._open.pop(request_id, None)
        if request is not None and request.first_token_s is not None and num_output_tokens >= FEWEST_TOKENS:
            tpot_s = (now - request.first_token_s) / (num_output_tokens - 1)
            self._costs.observe_tokens(request.placement.decode.worker_id, request.prediction.tpot_s, tpot_s)
