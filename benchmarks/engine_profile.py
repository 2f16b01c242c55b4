"""Where the time of a step goes inside the model.

The native decoder adds up the time of its parts itself. A model that transformers runs is seen through
``torch.profiler``, whose own library writes lines to standard error that no setting of it silences.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.engine_options import DecodeCase
from benchmarks.engine_work import WARM_UP_STEPS, Engine, wrapped
from workers.model.attention import torch_backend
from workers.model.fused_decoder import FusedDecoder
from workers.native.library import Parts

WHOLE = "model"
PARTS = ("embedding", "attention", "linears", "norms", "head")  # the head is one of the linears for transformers
PROFILED_STEPS = 4


@dataclass(frozen=True, slots=True)
class ModelSplit:
    """Mean seconds of one step by part of the model."""

    decode: dict[DecodeCase, dict[str, float]]
    prefill: dict[str, float]
    slowed_by_profiler: bool


async def split_model(engine: Engine, num_tokens: int, cases: Sequence[DecodeCase]) -> ModelSplit:
    """Some decode steps of each case, then one prompt of ``num_tokens``."""
    seconds: list[dict[str, float]] = []
    with ExitStack() as stack:
        if isinstance(engine.step_model, FusedDecoder):
            record, call = partial(_recorded_natively, engine.step_model, seconds), "run"
        else:
            record, call = partial(_recorded, seconds), "logits"
            _name_parts(engine, stack)
        stack.enter_context(wrapped(engine.step_model, call, record))
        decode = {}
        for case in cases:
            seconds.clear()
            await engine.decode(case.batch, case.context, PROFILED_STEPS, case.is_sampled)
            decode[case] = mean_split(seconds[WARM_UP_STEPS:])
        seconds.clear()
        await engine.prefill(num_tokens)
    return ModelSplit(decode, mean_split(seconds), slowed_by_profiler=engine.module is not None)


def _name_parts(engine: Engine, stack: ExitStack) -> None:
    """For the profiler, until the end of ``stack``."""
    assert engine.module is not None, "transformers runs the model"
    stack.enter_context(wrapped(engine.module, "forward", partial(record_function, WHOLE)))
    # Paged attention itself; the projections around it are linears.
    stack.enter_context(wrapped(torch_backend, "paged_attention", partial(record_function, "attention")))
    for module in engine.module.modules():
        part = part_of(module)
        if part is not None:
            stack.enter_context(wrapped(module, "forward", partial(record_function, part)))


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
def _recorded_natively(model: FusedDecoder, seconds: list[dict[str, float]]) -> Iterator[None]:
    model.parts = Parts()
    started_s = time.perf_counter()
    try:
        yield
        whole_s = time.perf_counter() - started_s
        seconds.append({WHOLE: whole_s} | {part: getattr(model.parts, part) / 1e9 for part in PARTS})
    finally:
        model.parts = None


@contextmanager
def _recorded(seconds: list[dict[str, float]]) -> Iterator[None]:
    """Profiles one step. Entered in the step's thread: the profiler sees the thread that started it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield
    averages = profiler.key_averages()
    seconds.append({event.key: event.cpu_time_total / 1e6 for event in averages if event.key in (WHOLE, *PARTS)})
