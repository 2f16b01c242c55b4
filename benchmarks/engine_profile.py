"""Where the time of a step goes inside a model that transformers runs, seen through ``torch.profiler``.

The profiler's own library writes lines to standard error that no setting of it silences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.engine_work import WARM_UP_STEPS, Engine, wrapped
from workers.model.attention import torch_backend

WHOLE = "model"
PARTS = ("embedding", "attention", "linears", "norms")
PROFILED_STEPS = 4


@dataclass(frozen=True, slots=True)
class ModelSplit:
    """Seconds of one step by part of the model; the profiler's own work makes all of them longer."""

    decode: dict[str, float]
    prefill: dict[str, float]


async def split_model(engine: Engine, num_tokens: int, batch: int, context: int) -> ModelSplit | None:
    """One prompt of ``num_tokens``, then some decode steps. None where the model is one native call."""
    if engine.module is None:
        return None
    with ExitStack() as stack:
        stack.enter_context(wrapped(engine.module, "forward", partial(record_function, WHOLE)))
        # Paged attention itself; the projections around it are linears.
        stack.enter_context(wrapped(torch_backend, "paged_attention", partial(record_function, "attention")))
        for module in engine.module.modules():
            part = part_of(module)
            if part is not None:
                stack.enter_context(wrapped(module, "forward", partial(record_function, part)))
        seconds: list[dict[str, float]] = []
        stack.enter_context(wrapped(engine.step_model, "logits", lambda: _recorded(seconds)))
        await engine.decode(batch, context, PROFILED_STEPS)
        decode = mean_split(seconds[WARM_UP_STEPS:])
        seconds.clear()
        await engine.prefill(num_tokens)
        return ModelSplit(decode, prefill=mean_split(seconds))


def part_of(module: nn.Module) -> str | None:
    """By the kind of the module; None for one that is made of others or is neither."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear) or kind == "Conv1D":  # the linear of GPT-2
        return "linears"
    return "norms" if "Norm" in kind else None


def mean_split(steps: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each part, and "other": what of the model is none of them."""
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step)
    means = {part: total[part] / len(steps) for part in PARTS}
    return {**means, "other": total[WHOLE] / len(steps) - sum(means.values())}


@contextmanager
def _recorded(seconds: list[dict[str, float]]) -> Iterator[None]:
    """Profiles one step. Entered in the step's thread: the profiler sees the thread that started it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield
    averages = profiler.key_averages()
    seconds.append({event.key: event.cpu_time_total / 1e6 for event in averages if event.key in (WHOLE, *PARTS)})
