"""The placement policies beside each other: the same requests, in virtual time, on unlike devices.

``python -m benchmarks.policies [--trace FILE] [--json FILE]``. Without a trace the requests are questions about
documents, some asked about more often than others, which no worker has room for all of. The controller is the one
that serves; its workers are modelled by the cost model (``scheduler/sim``). The model has 8 B parameters in 16 bits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.arrivals import arrivals_by_count
from benchmarks.command_line import Parser, exit_status, write_json
from benchmarks.machine import describe_run
from benchmarks.traces import MOONCAKE_BLOCK_TOKENS, TraceRow, load_trace
from kvcache.errors import ConfigError
from kvcache.spec import KVCacheSpec
from scheduler.garbage import collect_rarely
from scheduler.placement import PlacementOptions
from scheduler.policies import POLICIES
from scheduler.sim.simulator import Simulator
from scheduler.sim.workers import SimulatedRequest
from scheduler.types import DeviceProfile, ModelShape, WorkerInfo, WorkerRole

MAX_MODEL_LEN = 131_072
NUM_DOCUMENTS = 250
DOCUMENT_TOKENS = 8192
DOCUMENTS_RATE = 18.0  # requests per second where none is given
MAX_TOKENS = 2048  # asked for; answers are shorter
SPEC = KVCacheSpec(32, 8, 128, 16, "bfloat16")
SHAPE = ModelShape(
    num_layers=32,
    weight_bytes=14e9,
    head_bytes=1e9,
    linear_flops=14e9,
    head_flops=1e9,
    attention_flops=4.0 * 32 * 4096,
    kv_token_bytes=131_072,
)
# What serving reaches of the data sheets' rates, and prices: vendors' sheets, measured shares and cloud catalogues of
# 2026. A link moves what is left of a handoff when the prompt is computed.
H100 = DeviceProfile("H100", 791_000.0, 2_713.0, 80 << 30, price_per_hour=2.95, link_gb_s=25.0)
A100 = DeviceProfile("A100", 278_000.0, 1_407.0, 80 << 30, price_per_hour=1.95, link_gb_s=25.0)
L40S = DeviceProfile("L40S", 228_000.0, 674.0, 48 << 30, price_per_hour=1.55, link_gb_s=12.0)
PREFILL = (H100, H100, L40S, L40S)
DECODE = (H100, A100, A100, L40S)


@dataclass(frozen=True, slots=True)
class PolicyResult:
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    goodput: float  # part of the requests that keep both targets
    cache_hit_rate: float  # part of the prompt tokens that were not computed
    in_place: float  # part of the requests whose prompt their decode worker computed
    usd_per_million_tokens: float  # of device time in use, over prompt and output tokens


def fleet() -> list[WorkerInfo]:
    pools = ((WorkerRole.PREFILL, PREFILL), (WorkerRole.DECODE, DECODE))
    return [_worker(role, number, device) for role, devices in pools for number, device in enumerate(devices)]


def _worker(role: WorkerRole, number: int, device: DeviceProfile) -> WorkerInfo:
    worker_id = f"{role.value}-{number}"
    kv_bytes = 0.9 * device.memory_bytes - SHAPE.weight_bytes - 2 * SHAPE.head_bytes
    num_blocks = int(kv_bytes / SHAPE.kv_token_bytes / SPEC.block_size)
    return WorkerInfo(
        worker_id, 1, role, worker_id, 1, device, "8b", MAX_MODEL_LEN, SPEC, num_blocks, SHAPE,
        max_num_seqs=256, max_num_batched_tokens=2048,
    )  # fmt: skip


def simulate(rows: Sequence[TraceRow], options: PlacementOptions) -> PolicyResult:
    simulator = Simulator(fleet(), options, MOONCAKE_BLOCK_TOKENS, MAX_TOKENS)
    requests = [_request(number, row) for number, row in enumerate(rows)]
    simulator.run(requests)
    return summarize(requests, simulator, options)


def _request(number: int, row: TraceRow) -> SimulatedRequest:
    num_full = row.input_tokens // MOONCAKE_BLOCK_TOKENS
    return SimulatedRequest(
        f"r{number}", row.arrival_s, row.input_tokens, row.output_tokens, row.prefix_block_ids[:num_full]
    )


def summarize(requests: Sequence[SimulatedRequest], simulator: Simulator, options: PlacementOptions) -> PolicyResult:
    ttft = np.array([request.ttft_s for request in requests])
    tpot = np.array([request.tpot_s for request in requests])
    good = (ttft <= options.ttft_target_s) & (tpot <= options.tpot_target_s)
    prompt_tokens = sum(request.num_prompt_tokens for request in requests)
    tokens = prompt_tokens + sum(request.num_output_tokens for request in requests)
    spent = sum(worker.busy_s * worker.info.device.price_per_hour / 3600 for worker in simulator.workers.values())
    in_place = sum(request.placement is not None and request.placement.prefill is None for request in requests)
    ttft_p50, ttft_p99 = (round(1000 * float(np.percentile(ttft, share)), 1) for share in (50, 99))
    tpot_p50, tpot_p99 = (round(1000 * float(np.percentile(tpot, share)), 2) for share in (50, 99))
    return PolicyResult(
        ttft_p50,
        ttft_p99,
        tpot_p50,
        tpot_p99,
        goodput=round(float(good.mean()), 4),
        cache_hit_rate=round(sum(request.num_cached_tokens for request in requests) / prompt_tokens, 4),
        in_place=round(in_place / len(requests), 4),
        usd_per_million_tokens=round(spent / tokens * 1e6, 4),
    )


def read_rows(path: Path, count: int, request_rate: float | None, seed: int) -> list[TraceRow]:
    """The first rows; with a rate, as a Poisson process of that rate."""
    rng = np.random.default_rng(seed)
    rows = [row for row in load_trace(path, rng) if row.input_tokens + row.output_tokens < MAX_MODEL_LEN][:count]
    if request_rate is None:
        return rows
    times = arrivals_by_count(rng, request_rate, 1.0, len(rows))
    return [replace(row, arrival_s=float(time)) for row, time in zip(rows, times, strict=True)]


def ask_about_documents(count: int, request_rate: float, seed: int) -> list[TraceRow]:
    """Questions of 300 tokens behind documents of 8,192, answered in 150 tokens on average; Poisson arrivals."""
    rng = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, NUM_DOCUMENTS + 1) ** 0.7
    documents = rng.choice(NUM_DOCUMENTS, size=count, p=popularity / popularity.sum())
    outputs = 1 + rng.geometric(1 / 150, size=count)
    times = arrivals_by_count(rng, request_rate, 1.0, count)
    blocks = DOCUMENT_TOKENS // MOONCAKE_BLOCK_TOKENS
    return [
        TraceRow(
            float(time),
            DOCUMENT_TOKENS + 300,
            min(int(output), MAX_TOKENS),
            tuple(range(int(document) * blocks, (int(document) + 1) * blocks)),
        )
        for time, document, output in zip(times, documents, outputs, strict=True)
    ]


def table(results: dict[str, PolicyResult]) -> str:
    lines = [
        "| policy | TTFT p50 / p99 s | TPOT p50 / p99 ms | goodput | cached | in place | $ per 1 M tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        lines.append(
            f"| {name} | {result.ttft_p50_ms / 1000:.2f} / {result.ttft_p99_ms / 1000:.2f}"
            f" | {result.tpot_p50_ms:.1f} / {result.tpot_p99_ms:.1f} | {result.goodput:.1%}"
            f" | {result.cache_hit_rate:.1%} | {result.in_place:.1%} | {result.usd_per_million_tokens:.3f} |"
        )
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.policies", description="Compares placement policies in virtual time.")
    parser.add_argument("--trace", type=Path, help="Mooncake JSONL (default: questions about documents)")
    parser.add_argument("--num-requests", type=int, default=3000)
    parser.add_argument("--request-rate", type=float, help="Poisson arrivals per second (default: the trace's, or 18)")
    parser.add_argument("--ttft-target-ms", type=float, default=5000.0)
    parser.add_argument("--tpot-target-ms", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    collect_rarely()
    if args.num_requests < 1:
        raise ConfigError(f"--num-requests is {args.num_requests}; it must be at least 1")
    if args.trace is None:
        rows = ask_about_documents(args.num_requests, args.request_rate or DOCUMENTS_RATE, args.seed)
    else:
        rows = read_rows(args.trace, args.num_requests, args.request_rate, args.seed)
    results = {}
    for name in POLICIES:
        options = PlacementOptions(name, args.ttft_target_ms / 1000, args.tpot_target_ms / 1000, args.seed)
        results[name] = simulate(rows, options)
        print(name, results[name], file=sys.stderr, flush=True)
    print(table(results))
    setup = {key: value for key, value in vars(args).items() if key not in ("json", "trace")}
    devices = {"prefill": [each.name for each in PREFILL], "decode": [each.name for each in DECODE]}
    write_json(
        args.json,
        {
            "setup": setup
            | {"trace": args.trace.name if args.trace else "documents", "model": "8 B, 16 bits"}
            | devices,
            "policies": {name: asdict(result) for name, result in results.items()},
            **describe_run(),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(sys.argv[1:])))
