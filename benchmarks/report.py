"""The result of a run: the JSON object, with the keys of ``vllm bench serve``, and the table for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.machine import describe_run
from benchmarks.measurements import RequestOutcome, SummaryValue
from benchmarks.options import Options
from benchmarks.workload import PlannedRequest, offered_rate

LATE_SEND_MS = 50.0
LATENCIES = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2EL", "e2el"))

ResultValue = SummaryValue | str | Mapping[str, str | int | float | None]
Result = dict[str, ResultValue]


def build_result(
    options: Options, model: str, plan: Sequence[PlannedRequest], num_cut: int, summary: Mapping[str, SummaryValue]
) -> Result:
    """Everything that is known about a run. Free of paths, keys and host names but for ``base_url``."""
    rate = offered_rate(plan) if options.trace is not None else options.request_rate
    limits = options.goodput
    described = describe_run("aiohttp", "numpy")
    result: Result = {
        "date": described["date"],
        "backend": "openai",
        "endpoint_type": options.endpoint.value,
        "base_url": options.base_url,
        "model_id": model,
        "num_prompts": len(plan),
        "request_rate": _number(rate),
        "burstiness": None if options.trace is not None else _number(options.burstiness),
        "trace": None if options.trace is None else options.trace.name,
        "trace_scale": None if options.trace is None else options.trace_scale,
        "max_concurrency": options.max_concurrency,
        "temperature": options.temperature,
        "ignore_eos": options.ignore_eos,
        "seed": options.seed,
        "shortened_prompts": num_cut,
        "goodput_limits_ms": {"ttft": limits.ttft_ms, "tpot": limits.tpot_ms, "e2el": limits.e2el_ms},
        **summary,
        "machine": described["machine"],
        "versions": described["versions"],
    }
    return result


def format_table(result: Mapping[str, ResultValue], outcomes: Sequence[RequestOutcome]) -> str:
    """Counts, throughputs and latencies, then one line per thing that a reader should know before believing them."""
    lines = [
        f"{'Completed / failed':<34}{result['completed']} / {result['failed']}",
        _line("Duration (s)", result["duration"]),
        _line("Request rate offered (req/s)", result["request_rate"]),
        _line("Request throughput (req/s)", result["request_throughput"]),
        _line("Output throughput (tok/s)", result["output_throughput"]),
        _line("Total token throughput (tok/s)", result["total_token_throughput"]),
        _line("Input / output tokens", result["total_input_tokens"], result["total_output_tokens"]),
    ]
    if result["goodput"] is not None:
        lines.append(_line("Goodput (req/s, share of all)", result["goodput"], result["goodput_share"]))
    lines += ["", f"{'Latency (ms)':<16}{'mean':>12}{'median':>12}{'p99':>12}"]
    for label, name in LATENCIES:
        cells = "".join(f"{_cell(result[f'{kind}_{name}_ms']):>12}" for kind in ("mean", "median", "p99"))
        lines.append(f"{label:<16}{cells}")
    return "\n".join([*lines, *_remarks(result, outcomes)])


def _remarks(result: Mapping[str, ResultValue], outcomes: Sequence[RequestOutcome]) -> list[str]:
    remarks = []
    errors = result["errors"]
    details = {outcome.failure: outcome.detail for outcome in reversed(outcomes) if outcome.failure is not None}
    if isinstance(errors, Mapping):
        remarks += [f"failed: {count} x {reason}, first: {details[reason]}" for reason, count in errors.items()]
    if result["ignore_eos"] and result["short_answers"]:
        remarks.append(f"note: {result['short_answers']} answers were shorter than asked for in spite of ignore_eos")
    if result["shortened_prompts"]:
        remarks.append(f"note: {result['shortened_prompts']} prompts were cut by --max-input-tokens")
    send_delay_ms = result["p99_send_delay_ms"]
    if isinstance(send_delay_ms, float) and send_delay_ms > LATE_SEND_MS:
        cause = "held back by --max-concurrency" if result["max_concurrency"] else "is this machine overloaded?"
        remarks.append(f"note: requests left late (p99 {send_delay_ms:.0f} ms after their arrival): {cause}")
    return ["", *remarks] if remarks else []


def _line(label: str, *values: ResultValue) -> str:
    return f"{label:<34}" + " / ".join(_cell(value) for value in values)


def _cell(value: ResultValue) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def _number(value: float) -> float | str:
    """JSON has no infinity; ``vllm bench serve`` writes the string too."""
    return "inf" if math.isinf(value) else value
