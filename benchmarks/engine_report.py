"""The result of ``benchmarks.engine``: what goes to the JSON file, and the tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from benchmarks.engine_limits import MachineLimits, ModelCosts
from benchmarks.engine_options import LONG_CONTEXT, PYTHON_BATCH, DecodeCase, Options
from benchmarks.engine_profile import ModelSplit
from benchmarks.engine_ready import FreshProcess
from benchmarks.engine_work import MAX_BATCHED_TOKENS, PIECES, StepTimes, fractions_of_step, median_step, seconds_of
from benchmarks.machine import describe_run

Run = list[StepTimes]


@dataclass(frozen=True, slots=True)
class Measurements:
    """What was seen; one entry per run in every list."""

    step_model: str
    limits: MachineLimits
    prefill: dict[int, list[Run]]  # by prompt length
    decode: dict[DecodeCase, list[Run]]
    split: ModelSplit | None  # with --profile

    def prefill_tok_s(self, num_tokens: int) -> float:
        return median(num_tokens / seconds_of(run) for run in self.prefill[num_tokens])

    def decode_tok_s(self, case: DecodeCase) -> float:
        return median(case.batch * len(run) / seconds_of(run) for run in self.decode[case])


@dataclass(frozen=True, slots=True)
class LimitFractions:
    """Needed FLOP/s over the GEMM rate or the peak, needed bytes/s over the read bandwidth; by prompt length or batch.

    Decoding is bound by reading at small batches and by arithmetic at large ones; both fractions are told. The GEMM
    rate is of float32, the peak of the weights' dtype.
    """

    prefill_of_gemm: dict[str, float]
    prefill_of_peak: dict[str, float] | None
    decode_of_read: dict[str, float]
    decode_of_gemm: dict[str, float]
    decode_of_peak: dict[str, float] | None
    decode_of_read_context_1024: dict[str, float]
    decode_of_gemm_context_1024: dict[str, float]


@dataclass(frozen=True, slots=True)
class SampledDecode:
    tok_s: float
    python_fraction: float
    step_fractions: dict[str, float]


@dataclass(frozen=True, slots=True)
class Result:
    """The fields are the keys of the JSON object. Free of paths and host names."""

    date: str
    model: str
    dtype: str
    kv_cache_dtype: str
    threads: int
    step_model: str
    runs: int
    context: int  # of decode_tok_s
    prefill_tok_s: dict[str, float]  # by prompt length
    decode_tok_s: dict[str, float]  # by batch
    decode_tok_s_context_1024: dict[str, float]
    python_fraction_batch_32: float | None  # of a step, all but the model's own call; None: not among --batches
    step_fractions_batch_32: dict[str, float] | None  # its parts
    sampled_batch_32: SampledDecode | None  # the same with tokens drawn under top_p
    model_fractions: dict[str, dict[str, float]] | None  # with --profile: of the model's own call, by case and part
    ready_s: float
    peak_memory_bytes: int
    limits: MachineLimits
    fraction_of_limit: LimitFractions
    machine: dict[str, str | int]
    versions: dict[str, str]


def build_result(
    options: Options, costs: ModelCosts, measured: Measurements, fresh_processes: list[FreshProcess]
) -> Result:
    parts = median_fractions(measured.decode[options.python_case]) if options.python_case is not None else None
    folder = Path(options.model)
    return Result(
        model=folder.resolve().name if folder.is_dir() else options.model,
        dtype=options.dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        threads=options.num_threads,
        step_model=measured.step_model,
        runs=options.runs,
        context=options.context,
        prefill_tok_s={str(length): measured.prefill_tok_s(length) for length in options.prefill_tokens},
        decode_tok_s=_by_batch(options, measured, options.context),
        decode_tok_s_context_1024=_by_batch(options, measured, LONG_CONTEXT),
        python_fraction_batch_32=None if parts is None else 1 - parts["model"],
        step_fractions_batch_32=parts,
        sampled_batch_32=_sampled(options, measured),
        model_fractions=_model_fractions(options, measured.split) if measured.split is not None else None,
        ready_s=median(process.ready_s for process in fresh_processes),
        peak_memory_bytes=max(process.peak_memory_bytes for process in fresh_processes),
        limits=measured.limits,
        fraction_of_limit=fractions_of_limit(options, costs, measured),
        **describe_run("torch", "transformers", "numpy"),
    )


def _sampled(options: Options, measured: Measurements) -> SampledDecode | None:
    case = options.sampled_case
    if case is None:
        return None
    parts = median_fractions(measured.decode[case])
    return SampledDecode(measured.decode_tok_s(case), 1 - parts["model"], parts)


def _model_fractions(options: Options, split: ModelSplit) -> dict[str, dict[str, float]]:
    seconds = {case.name: parts for case, parts in split.decode.items()}
    seconds[f"prefill {min(options.prefill_tokens[0], MAX_BATCHED_TOKENS)}"] = split.prefill
    return {
        name: {part: spent / sum(parts.values()) for part, spent in parts.items()} for name, parts in seconds.items()
    }


def _by_batch(options: Options, measured: Measurements, context: int) -> dict[str, float]:
    return {str(batch): measured.decode_tok_s(DecodeCase(batch, context)) for batch in options.batches}


def median_fractions(runs: list[Run]) -> dict[str, float]:
    """Each piece's share in the run whose model call has the median share, so that they add up to 1."""
    shares = sorted((fractions_of_step(run) for run in runs), key=lambda parts: parts["model"])
    return shares[(len(shares) - 1) // 2]


def fractions_of_limit(options: Options, costs: ModelCosts, measured: Measurements) -> LimitFractions:
    gemm_flops_s, read_bytes_s = measured.limits.gemm_gflops * 1e9, measured.limits.read_gb_s * 1e9
    peak_flops_s = measured.limits.peak_gflops * 1e9 if measured.limits.peak_gflops is not None else None

    def prefill_of(flops_s: float) -> dict[str, float]:
        return {
            str(length): costs.prefill_flops(length) * measured.prefill_tok_s(length) / length / flops_s
            for length in options.prefill_tokens
        }

    def decode_of(flops_s: float, context: int) -> dict[str, float]:
        cases = {batch: DecodeCase(batch, context) for batch in options.batches}
        flops = {batch: costs.decode_flops(batch, case.mean_attended) for batch, case in cases.items()}
        return {str(batch): flops[batch] * measured.decode_tok_s(cases[batch]) / batch / flops_s for batch in cases}

    def of_read(case: DecodeCase) -> float:
        steps_s = measured.decode_tok_s(case) / case.batch
        return costs.decode_bytes(case.batch, case.mean_attended) * steps_s / read_bytes_s

    return LimitFractions(
        prefill_of_gemm=prefill_of(gemm_flops_s),
        prefill_of_peak=prefill_of(peak_flops_s) if peak_flops_s is not None else None,
        decode_of_read={str(batch): of_read(DecodeCase(batch, options.context)) for batch in options.batches},
        decode_of_gemm=decode_of(gemm_flops_s, options.context),
        decode_of_peak=decode_of(peak_flops_s, options.context) if peak_flops_s is not None else None,
        decode_of_read_context_1024={str(batch): of_read(DecodeCase(batch, LONG_CONTEXT)) for batch in options.batches},
        decode_of_gemm_context_1024=decode_of(gemm_flops_s, LONG_CONTEXT),
    )


def result_table(result: Result) -> Table:
    """Rates beside the limits; below them what is one number."""
    limits, fractions = result.limits, result.fraction_of_limit
    table = _table(
        f"{result.model}, {result.dtype}, KV: {result.kv_cache_dtype}, threads: {result.threads},"
        f" through {result.step_model}, medians of {result.runs}",
        ("tok/s", "of GEMM rate", "of peak", "of read bandwidth"),
    )
    of_peak = fractions.prefill_of_peak or {}
    for length, rate in result.prefill_tok_s.items():
        peak = f"{of_peak[length]:.0%}" if of_peak else ""
        table.add_row(f"prefill {length}", f"{rate:,.1f}", f"{fractions.prefill_of_gemm[length]:.0%}", peak, "")
    for context, rates, of_gemm, of_peak, of_read in (
        (
            result.context,
            result.decode_tok_s,
            fractions.decode_of_gemm,
            fractions.decode_of_peak or {},
            fractions.decode_of_read,
        ),
        (
            LONG_CONTEXT,
            result.decode_tok_s_context_1024,
            fractions.decode_of_gemm_context_1024,
            {},
            fractions.decode_of_read_context_1024,
        ),
    ):
        for batch, rate in rates.items():
            name = f"decode {batch}, context {context}"
            peak = f"{of_peak[batch]:.0%}" if batch in of_peak else ""
            table.add_row(name, f"{rate:,.1f}", f"{of_gemm[batch]:.0%}", peak, f"{of_read[batch]:.0%}")
    if result.sampled_batch_32 is not None:
        table.add_row(
            f"decode {PYTHON_BATCH}, context {result.context}, top_p", f"{result.sampled_batch_32.tok_s:,.1f}"
        )
    table.add_section()
    peak = f"{limits.peak_gflops:.0f} GFLOP/s" if limits.peak_gflops is not None else ""
    table.add_row("machine", "", f"{limits.gemm_gflops:.0f} GFLOP/s", peak, f"{limits.read_gb_s:.1f} GB/s")
    table.add_row("ready", f"{result.ready_s:.1f} s")
    table.add_row("peak memory", f"{result.peak_memory_bytes >> 20:,} MiB")
    if result.python_fraction_batch_32 is not None:
        table.add_row(f"outside the model, decode {PYTHON_BATCH}", f"{result.python_fraction_batch_32:.1%}")
    if result.sampled_batch_32 is not None:
        table.add_row("the same with top_p", f"{result.sampled_batch_32.python_fraction:.1%}")
    return table


def profile_tables(measured: Measurements) -> list[Table]:
    """Every decode case's steps, and the first step of the first prompt: milliseconds, and the share of each part."""
    length = next(iter(measured.prefill))
    prompt = f"first step of prefill {length}"
    steps = {
        case.name: median_step([step for run in runs for step in run]) for case, runs in measured.decode.items()
    } | {prompt: median_step([run[0] for run in measured.prefill[length]])}
    pieces = {name: {piece: getattr(step, piece) for piece in PIECES} for name, step in steps.items()}
    tables = [_shares_table("A step, medians", pieces)]
    if measured.split is not None:
        slowed = ", slowed down by torch.profiler" if measured.split.slowed_by_profiler else ""
        splits = {case.name: split for case, split in measured.split.decode.items()} | {prompt: measured.split.prefill}
        tables.append(_shares_table(f"Inside the model{slowed}", splits))
    return tables


def _shares_table(title: str, seconds: Mapping[str, Mapping[str, float]]) -> Table:
    parts = next(iter(seconds.values()))
    table = _table(title, ("ms", *(part.replace("_", " ") for part in parts)))
    for name, spent in seconds.items():
        total = sum(spent.values())
        table.add_row(name, f"{1e3 * total:,.2f}", *(f"{spent[part] / total:.1%}" for part in parts))
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table("", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table
