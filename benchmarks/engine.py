"""Speed of one worker: ``python -m benchmarks.engine [--threads 1] [--dtype float32] [--json FILE]``.

The step loop that serves, without HTTP, gRPC and Ray, beside what this machine can do at the same moment. All
cases take turns, so that a slow minute of the machine meets each of them.

Exit status: 0, 1 when it cannot run, 2 for a wrong flag, 130 when interrupted.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from tqdm import tqdm

from benchmarks.command_line import exit_status, write_json
from benchmarks.engine_limits import MachineLimits, measure_limits, read_costs
from benchmarks.engine_options import DecodeCase, Options, check_lengths, parse_options
from benchmarks.engine_profile import split_model
from benchmarks.engine_ready import FreshProcess, measure_fresh_process
from benchmarks.engine_report import (
    Measurements,
    Result,
    Run,
    build_result,
    profile_tables,
    result_table,
)
from benchmarks.engine_work import MAX_BATCHED_TOKENS, QUANTIZED, EngineSettings, num_blocks_needed, open_engine
from workers.model.checkpoint import describe_checkpoint, prepare_checkpoint


async def measure(options: Options, settings: EngineSettings, bar: tqdm[Any]) -> Measurements:
    """All but the fresh processes. Model and KV cache are given back before it returns."""
    prefill: dict[int, list[Run]] = {length: [] for length in options.prefill_tokens}
    decode: dict[DecodeCase, list[Run]] = {case: [] for case in options.decode_cases}
    num_blocks = num_blocks_needed([*prefill], options.batches, [case.context for case in decode])
    limits = MachineLimits(0.0, 0.0)
    async with open_engine(settings, num_blocks, max(options.batches)) as engine:
        await engine.prefill(min(prefill))
        for _ in range(options.runs):
            bar.set_description("limits of the machine")
            limits = limits.better_of(measure_limits(options.dtype))
            bar.update()
            for length, prefill_runs in prefill.items():
                bar.set_description(f"prefill {length}")
                prefill_runs.append(await engine.prefill(length))
                bar.update()
            for case, decode_runs in decode.items():
                bar.set_description(case.name)
                decode_runs.append(await engine.decode(case.batch, case.context, is_sampled=case.is_sampled))
                bar.update()
        split = None
        if options.profile:
            bar.set_description("profile")
            first_chunk = min(options.prefill_tokens[0], MAX_BATCHED_TOKENS)
            split = await split_model(engine, first_chunk, options.decode_cases)
        return Measurements(engine.step_model_name, limits, prefill, decode, split)


def measure_all(options: Options) -> tuple[Measurements, Result]:
    """Raises a StartupError when something does not fit or cannot be loaded."""
    checkpoint = describe_checkpoint(prepare_checkpoint(options.model), dtype=options.loaded_dtype, device="cpu")
    check_lengths(options, checkpoint)
    step_model = options.dtype if options.dtype in QUANTIZED else options.step_model
    settings = EngineSettings(checkpoint, options.num_threads, step_model, options.kv_cache_dtype)
    costs = read_costs(checkpoint, settings.spec, options.dtype)
    tqdm.monitor_interval = 0  # no thread of the bar's own
    cases_per_run = len(options.prefill_tokens) + len(options.decode_cases)
    with tqdm(
        total=options.runs * (1 + cases_per_run + 1), file=sys.stderr, disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        measured = asyncio.run(measure(options, settings, bar))
        fresh_processes: list[FreshProcess] = []
        for _ in range(options.runs):
            bar.set_description("fresh process")
            fresh_processes.append(measure_fresh_process(settings, max(options.prefill_tokens)))
            bar.update()
    return measured, build_result(options, costs, measured, fresh_processes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    measured, result = measure_all(options)
    console = Console()
    console.print(result_table(result))
    for table in profile_tables(measured) if options.profile else ():
        console.print(table)
    write_json(options.json_path, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
