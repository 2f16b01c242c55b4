"""The scheduler's figures: ``python -m benchmarks.scheduler [--mixed-load SCRIPT] [--json FILE]``.

========  ==============================================================================================
core      placements per second in one process, and what more workers cost; no Ray, virtual time
live      the same through the real Ray actor, and what a placement adds to the time to the first token
cost      how far off the cost model is on this machine, after traffic (``benchmarks.scheduler_cost``)
mixed     chats with long prompts between them, on our servers and on peers, in turns
capacity  the highest rate of such chats that each of these servers can take
========  ==============================================================================================

All but capacity are measured; mixed only with ``--mixed-load``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import orjson

from benchmarks.command_line import Parser, check_json, exit_status, write_json
from benchmarks.machine import describe_run
from benchmarks.scheduler_core import CoreResult, measure_core
from benchmarks.scheduler_live import measure_live
from benchmarks.scheduler_mixed import OWN_SERVERS, MixedLoad, measure_capacity, measure_mixed, targets
from kvcache.errors import ConfigError, ResourceError
from scheduler.policies import POLICIES

PARTS = ("core", "live", "cost", "mixed", "capacity")
DEFAULT_PARTS = "core,live,cost,mixed"
NUM_WORKERS, NUM_IN_FLIGHT = 1000, 100_000
FEWEST_WORKERS, MOST_WORKERS = 10, 10_000
Report = dict[str, object]


class Settings:
    """The command line, checked."""

    def __init__(self, arguments: Sequence[str]) -> None:
        args = _parser().parse_args(arguments)
        check_json(args.json)
        self.json: Path | None = args.json
        given = DEFAULT_PARTS if args.parts is None else args.parts
        self.parts: list[str] = [part for part in given.split(",") if part]
        if args.parts is None and args.mixed_load is None:
            self.parts.remove("mixed")
            print("mixed is left out: it needs --mixed-load, the script that makes the load", file=sys.stderr)
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ConfigError(f"--parts is {args.parts!r}; there are {', '.join(PARTS)}")
        if args.placements < 1000 or args.rounds < 1 or args.seconds <= 0:
            raise ConfigError("--placements must be at least 1000, --rounds at least 1 and --seconds above 0")
        if args.policy not in POLICIES:
            raise ConfigError(f"--policy is {args.policy!r}; there are {', '.join(POLICIES)}")
        self.placements: int = args.placements
        self.policy: str = args.policy
        self.rounds: int = args.rounds
        self.load: MixedLoad | None = None
        if "mixed" in self.parts or "capacity" in self.parts:
            if args.mixed_load is None:
                raise ConfigError("--parts mixed and capacity need --mixed-load, the script that makes the load")
            rates = (args.chat_rate, args.long_rate, args.ttft_ms, args.tpot_ms)
            self.load = MixedLoad(args.mixed_load, args.seconds, *rates)
        self.chat_rates = _rates(args.chat_rates)
        own = [name for name in args.own.split(",") if name]
        self.servers = targets(own, args.peer, args.port, args.ttft_ms, args.tpot_ms)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0 or rates != sorted(set(rates)):
        raise ConfigError(f"--chat-rates is {text!r}; it must be growing numbers above 0, with commas between them")
    return rates


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.scheduler", description="Measures the scheduler.")
    parser.add_argument(
        "--parts", help=f"some of {','.join(PARTS)} (default: {DEFAULT_PARTS}, the last one with --mixed-load only)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--placements", type=int, default=20_000, help="measured, of core and live")
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--mixed-load", type=Path, metavar="SCRIPT", help="makes the load of the part mixed")
    parser.add_argument("--own", default=",".join(OWN_SERVERS), help="our servers in the part mixed")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND|URL", help="may be repeated")
    parser.add_argument("--port", type=int, default=8123, help="of the servers that are started")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each run of the mixed load")
    parser.add_argument("--chat-rate", type=float, default=0.7)
    parser.add_argument("--chat-rates", default="0.5,0.7,0.9,1.2,1.5", metavar="RATES", help="tried by capacity")
    parser.add_argument("--long-rate", type=float, default=0.12)
    parser.add_argument("--ttft-ms", type=float, default=1500.0)
    parser.add_argument("--tpot-ms", type=float, default=120.0)
    return parser


def measure_core_part(settings: Settings) -> Iterator[Report]:
    """Three sizes of cluster with the same load per worker, the largest with that of the middle one.

    ``placements_per_s``: placements; ``requests_per_s``: requests with all their events and heartbeats;
    ``with_admission``: both where events pass admission first, as they do in the scheduler.
    """
    sizes = {FEWEST_WORKERS: 1000, NUM_WORKERS: NUM_IN_FLIGHT, MOST_WORKERS: NUM_IN_FLIGHT}
    results: dict[int, CoreResult] = {}
    for num_workers, num_in_flight in sizes.items():
        results[num_workers] = measure_core(num_workers, num_in_flight, settings.placements, settings.policy)
        print(results[num_workers], file=sys.stderr, flush=True)
    admitted = measure_core(NUM_WORKERS, NUM_IN_FLIGHT, settings.placements, settings.policy, with_admission=True)
    print(f"with admission: {admitted}", file=sys.stderr, flush=True)
    yield {
        "placements_per_s": results[NUM_WORKERS].placements_per_s,
        "requests_per_s": results[NUM_WORKERS].requests_per_s,
        "p99_us": results[NUM_WORKERS].p99_us,
        "growth_10_to_10000": results[MOST_WORKERS].mean_us / results[FEWEST_WORKERS].mean_us,
        "with_admission": asdict(admitted),
        "core": [asdict(result) for result in results.values()],
    }


def measure_live_part(settings: Settings) -> Iterator[Report]:
    result = measure_live(settings.placements, seconds=15.0, policy=settings.policy)
    print(result, file=sys.stderr, flush=True)
    yield {
        "live_placements_per_s": result.placements_per_s,
        "ttft_added_ms": {"p50": result.delay_p50_ms, "p99": result.delay_p99_ms},
    }


def measure_cost_part(_settings: Settings) -> Iterator[Report]:
    measured = _cost_model_error()
    yield {"cost_model_error": {name: measured[name] for name in ("tpot_median", "ttft_median")}}


def _cost_model_error() -> Mapping[str, float]:
    """In a process of its own, which starts a cluster and ends it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cost.json"
        command = [sys.executable, "-m", "benchmarks.scheduler_cost", "--json", str(file)]
        if subprocess.run(command, check=False).returncode:
            raise ResourceError("benchmarks.scheduler_cost failed")
        measured: Mapping[str, float] = orjson.loads(file.read_bytes())["cost_model_error"]
    return measured


def measure_mixed_part(settings: Settings) -> Iterator[Report]:
    """After each round: all of them take long, and may be stopped."""
    assert settings.load is not None, "checked with the command line"
    load = {key: value for key, value in asdict(settings.load).items() if key != "script"}
    for rounds, servers in enumerate(measure_mixed(settings.servers, settings.load, settings.rounds), 1):
        for name, numbers in servers.items():
            print(name, numbers["median"], file=sys.stderr, flush=True)
        yield {"mixed": {"load": load | {"rounds": rounds}, "servers": servers}}


def measure_capacity_part(settings: Settings) -> Iterator[Report]:
    assert settings.load is not None, "checked with the command line"
    result = measure_capacity(settings.servers, settings.load, settings.chat_rates)
    for name, numbers in result.items():
        print(name, numbers["highest_chat_rate"], file=sys.stderr, flush=True)
    yield {"capacity": result}


def _circumstances() -> Report:
    return {**describe_run("ray")}


def run(arguments: Sequence[str]) -> int:
    """Writes what there is after each part, for a later one may fail or be stopped."""
    settings = Settings(arguments)
    measures: dict[str, Callable[[Settings], Iterator[Report]]] = {
        "core": measure_core_part,
        "live": measure_live_part,
        "cost": measure_cost_part,
        "mixed": measure_mixed_part,
        "capacity": measure_capacity_part,
    }
    report: Report = {}
    for part in settings.parts:
        for measured in measures[part](settings):
            report |= measured
            write_json(settings.json, report | _circumstances())
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(sys.argv[1:])))
