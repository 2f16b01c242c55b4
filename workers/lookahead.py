"""The step after the one that runs: planned and prepared beside it, and begun without a pause if nothing changes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from scheduler.step_plan import StepOutput, StepPlan
from workers.model.step_model import PreparedInputs


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """Its tokens are unknown until the step before it has sampled them."""

    plan: StepPlan
    inputs: PreparedInputs

    def set_tokens(self, output: StepOutput) -> bool:
        """Fills in what the step before has sampled; False where one of those tokens ends its sequence."""
        tokens = []
        for chunk in self.plan.chunks:
            token_id = output.tokens[chunk.request_id]
            if chunk.sampling is not None and token_id in chunk.sampling.stop_token_ids:
                return False
            tokens.append(token_id)
        self.inputs.set_tokens(tokens)
        return True


def with_tokens(plan: StepPlan, output: StepOutput) -> StepPlan:
    """A plan that was made ahead, with the tokens that the step before it has sampled."""
    return StepPlan(tuple(replace(chunk, token_ids=(output.tokens[chunk.request_id],)) for chunk in plan.chunks))


class Lookahead:
    """At most one step on offer. The event loop offers and withdraws it; the step's thread takes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offered: PreparedStep | None = None

    def offer(self, step: PreparedStep) -> None:
        with self._lock:
            self._offered = step

    def withdraw(self) -> None:
        """What has been taken runs nevertheless."""
        self._swap_out()

    def take(self, output: StepOutput) -> PreparedStep | None:
        """The step on offer, with the tokens in ``output``, if it is what comes next; no longer on offer."""
        step = self._swap_out()
        return step if step is not None and step.set_tokens(output) else None

    def _swap_out(self) -> PreparedStep | None:
        with self._lock:
            step, self._offered = self._offered, None
        return step
