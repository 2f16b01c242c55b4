"""Load generator: ``python -m benchmarks.serve --base-url URL --request-rate 4 --num-prompts 200``.

The loop is open: each request leaves at its planned time, whether or not earlier ones were answered, as
users do. The definitions of what is measured stand in ``benchmarks.measurements``.

Exit status: 0, 1 when nothing completed or the server cannot be used, 2 for a wrong flag or trace, 130 when
interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.client import RequestStyle, ServingClient
from benchmarks.command_line import exit_status, write_json
from benchmarks.measurements import RequestOutcome, summarize
from benchmarks.options import Options, parse_options
from benchmarks.progress import Progress
from benchmarks.report import Result, build_result, format_table
from benchmarks.traces import load_trace
from benchmarks.workload import (
    PlannedRequest,
    PromptMaker,
    RandomStream,
    SyntheticLoad,
    plan_synthetic,
    plan_trace,
    shorten_inputs,
    stream_rng,
)
from kvcache.errors import ConfigError, StartupError

WARM_UP_INPUT_TOKENS = 64
WARM_UP_OUTPUT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class LoadRun:
    """The outcomes in the order of the plan, and the seconds from the start to the last answer."""

    outcomes: list[RequestOutcome]
    duration_s: float


def make_plan(options: Options) -> list[PlannedRequest]:
    """All requests of the run, with the prompts at their full length. Raises ConfigError if there is none."""
    if options.trace is not None:
        rows = load_trace(options.trace, stream_rng(options.seed, RandomStream.ARRIVALS))
        plan = plan_trace(rows, options.trace_scale, options.num_prompts, options.duration_s)
    else:
        load = SyntheticLoad(
            options.request_rate,
            options.burstiness,
            options.num_prompts,
            options.duration_s,
            options.input_lengths,
            options.output_lengths,
        )
        plan = plan_synthetic(load, options.seed)
    if not plan:
        raise ConfigError("no request arrives within --duration; make it longer or the rate higher")
    return plan


async def run_benchmark(options: Options) -> tuple[Result, list[RequestOutcome]]:
    """Warm up, send the whole plan, summarize. Raises a StartupError when the server cannot be used at all."""
    full_plan = make_plan(options)
    plan = full_plan
    if options.max_input_tokens is not None:
        plan = shorten_inputs(full_plan, options.max_input_tokens)
    num_cut = sum(cut != full for cut, full in zip(plan, full_plan, strict=True))
    prompts = PromptMaker(options.seed, *options.token_ids)
    async with ServingClient(options.base_url, options.api_key, options.timeout_s) as client:
        model = options.model or await client.first_model()
        style = RequestStyle(options.endpoint, model, options.temperature, options.ignore_eos)
        await _warm_up(client, style, plan[0], prompts.for_warm_up())
        progress = Progress(sys.stderr, len(plan))
        load_run = await run_load(client, style, plan, prompts, options.max_concurrency, progress)
    summary = summarize(load_run.outcomes, load_run.duration_s, options.goodput)
    return build_result(options, model, plan, num_cut, summary), load_run.outcomes


async def run_load(
    client: ServingClient,
    style: RequestStyle,
    plan: Sequence[PlannedRequest],
    prompts: PromptMaker,
    max_concurrency: int | None,
    progress: Progress,
) -> LoadRun:
    """Send each request at its arrival time and wait for all of them."""
    gate: contextlib.AbstractAsyncContextManager[object] = contextlib.nullcontext()
    if max_concurrency is not None:
        gate = asyncio.Semaphore(max_concurrency)
    body = style.body(plan[0], prompts)
    start_s = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - start_s

    async def send(request: PlannedRequest, body: bytes) -> RequestOutcome:
        async with gate:
            outcome = await client.stream(style.endpoint, request, body, clock)
        progress.advance(failed=outcome.failure is not None, now_s=clock())
        return outcome

    tasks: list[asyncio.Task[RequestOutcome]] = []
    async with asyncio.TaskGroup() as group:
        for position, request in enumerate(plan):
            await _sleep_until(request.arrival_s, clock)
            tasks.append(group.create_task(send(request, body)))
            await asyncio.sleep(0)  # lets the request leave before the processor is busy with the next body
            # The next body is encoded while waiting for its time, so that a long prompt does not leave late.
            if position + 1 < len(plan):
                body = style.body(plan[position + 1], prompts)
    return LoadRun([task.result() for task in tasks], clock())


async def _sleep_until(moment_s: float, clock: Callable[[], float]) -> None:
    await asyncio.sleep(max(0.0, moment_s - clock()))


async def _warm_up(client: ServingClient, style: RequestStyle, first: PlannedRequest, prompts: PromptMaker) -> None:
    """One short request that is not counted; it also finds out whether the flags suit the server."""
    request = PlannedRequest(
        index=0,
        arrival_s=0.0,
        input_tokens=min(first.input_tokens, WARM_UP_INPUT_TOKENS),
        output_tokens=min(first.output_tokens, WARM_UP_OUTPUT_TOKENS),
    )
    start_s = time.perf_counter()
    body = style.body(request, prompts)
    outcome = await client.stream(style.endpoint, request, body, lambda: time.perf_counter() - start_s)
    if outcome.failure is not None:
        raise StartupError(f"the warm-up request failed ({outcome.failure}): {outcome.detail}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    result, outcomes = asyncio.run(run_benchmark(options))
    print(format_table(result, outcomes))
    write_json(options.json_path, result)
    return 0 if result["completed"] else 1


if __name__ == "__main__":
    sys.exit(main())
