"""What is said of a request when it is placed, and how it turned out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from scheduler.cost_model import CostModel
from scheduler.types import Placement, Prediction

MAX_OPEN = 1024
JOINING_STEPS = 0.5  # a worker takes a sequence up between two steps
FEWEST_TOKENS = 8  # of an answer that tells how long a token took: shorter ones are all beginning and end


class WorkerBooks(Protocol):
    """What the scheduler has placed on a worker."""

    @property
    def decoding_size(self) -> int:
        """Sequences that decode there now: those whose prompts are still to come join one by one, as others leave."""
        ...

    @property
    def decoding_context_tokens(self) -> int: ...

    @property
    def batch_size(self) -> int:
        """Those that decode, and those whose prompts are still to come."""
        ...

    @property
    def batch_context_tokens(self) -> int: ...

    def others_beside(self, now: float, begin_s: float, seconds: float) -> float:
        """How many others decode there on average beside one that does so from ``begin_s`` on, for some ``seconds``."""
        ...

    def backlog_s(self, now: float, prefill_s: float) -> float:
        """Predicted seconds until a prompt placed now, which takes ``prefill_s`` itself, would be begun."""
        ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one request, in tokens."""

    prompt: int
    output: int  # expected
    cached: int = 0  # of the prompt, where it is computed
    held: int = 0  # of the prompt, where it is decoded: need not be sent there


def predict(
    costs: CostModel,
    placement: Placement,
    sizes: Sizes,
    prefill_s: float,
    prefill: WorkerBooks,
    decode: WorkerBooks,
    now: float,
) -> Prediction:
    """Before the request is entered in the books. ``prefill`` is ``decode`` for a prompt in place.

    Args:
        prefill_s: predicted to compute its prompt.
    """
    decode_id = placement.decode.worker_id
    prefill_id = placement.prefill.worker_id if placement.prefill is not None else decode_id
    own_tokens = sizes.prompt + sizes.output // 2
    context_tokens = decode.decoding_context_tokens + own_tokens
    step_s = costs.decode_step_seconds(decode_id, decode.decoding_size + 1, context_tokens)
    ttft_s = prefill.backlog_s(now, prefill_s) + prefill_s + costs.start_seconds(prefill_id)
    if placement.prefill is not None:
        ttft_s += costs.transfer_seconds(prefill_id, decode_id, sizes.prompt - sizes.held)
    elif decode.decoding_size:
        ttft_s += step_s * JOINING_STEPS
    num_steps = max(1, sizes.output - 1)
    others = decode.others_beside(now, now + ttft_s, num_steps * step_s)
    mean_tokens = decode.batch_context_tokens / decode.batch_size if decode.batch_size else own_tokens
    tpot_s = costs.decode_step_seconds(decode_id, 1 + others, own_tokens + others * mean_tokens)
    joining = min(1.0, others) * JOINING_STEPS / num_steps
    return Prediction(ttft_s, tpot_s * (1 + joining))


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
