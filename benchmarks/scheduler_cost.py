"""How far off the cost model is live: ``python -m benchmarks.scheduler_cost [--json FILE]``.

Starts a cluster of one prefill and one decode worker with a thread each, sends a seeded mix of short, middle and long
prompts at it, and asks it for its own errors after a minute: medians of |predicted - real| / real over the newest
requests, each predicted when it was placed, queues included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from benchmarks.client import Endpoint, RequestStyle, ServingClient
from benchmarks.command_line import Parser, exit_status, write_json
from benchmarks.machine import describe_run
from benchmarks.measurements import RequestOutcome
from benchmarks.progress import Progress
from benchmarks.serve import run_load
from benchmarks.workload import PlannedRequest, PromptMaker, RandomStream, stream_rng
from kvcache.errors import StartupError
from scheduler.types import ClusterSnapshot, PredictionErrors

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 120.0
SETTLE_S = 1.5  # until the last heartbeats are in what the server tells
TOKEN_IDS = (100, 40_000)


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one size, arriving at random."""

    rate: float  # per second
    prompt_tokens: tuple[int, int]  # from, to
    output_tokens: int


MIXES = {
    # About a third of what one core can prefill, and batches of some sequences to decode.
    "short": (Kind(1.0, (32, 128), 32), Kind(0.3, (128, 384), 24), Kind(0.05, (800, 1200), 16)),
    # As in the part mixed of ``benchmarks.scheduler``: answers that last longer beside prompts that do.
    "chats": (Kind(0.7, (64, 64), 64), Kind(0.12, (1500, 1500), 8)),
}
DEFAULT_MIX = "short"


@dataclass(frozen=True, slots=True)
class CostModelError:
    """``tpot_median`` and ``ttft_median``: over the newest requests. ``workers``: the errors of each, by id."""

    tpot_median: float
    ttft_median: float
    requests: int
    seconds: float
    workers: dict[str, PredictionErrors]


def plan_mix(seconds: float, seed: int, mix: Sequence[Kind] = MIXES[DEFAULT_MIX]) -> list[PlannedRequest]:
    """The same requests for the same seed, in the order of arrival."""
    arrivals: list[tuple[float, int, int]] = []
    for index, kind in enumerate(mix):
        rng = stream_rng(seed, RandomStream.ARRIVALS, index)
        now = rng.exponential(1 / kind.rate)
        while now < seconds:
            arrivals.append((now, int(rng.integers(*kind.prompt_tokens, endpoint=True)), kind.output_tokens))
            now += rng.exponential(1 / kind.rate)
    return [PlannedRequest(index, *arrival) for index, arrival in enumerate(sorted(arrivals))]


def measure_cost_error(
    seconds: float = 75.0, seed: int = 0, mix: str = DEFAULT_MIX, serve_arguments: Sequence[str] = ()
) -> CostModelError:
    """
    Args:
        mix: one of ``MIXES``.

    Raises:
        StartupError: the cluster does not start, or does not answer every request.
    """
    plan = plan_mix(seconds, seed, MIXES[mix])
    with serving(*serve_arguments) as url:
        outcomes = asyncio.run(_send(url, plan, seed))
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        if failures:
            raise StartupError(f"{len(failures)} of {len(outcomes)} requests failed, the first by {failures[0]}.")
        time.sleep(SETTLE_S)
        workers = {worker.info.worker_id: worker.errors for worker in read_cluster(url).workers}
    ttft, tpot = workers["prefill-0"].ttft, workers["decode-0"].tpot
    if ttft is None or tpot is None:
        raise StartupError("No request was predicted.")
    return CostModelError(tpot, ttft, len(plan), seconds, workers)


async def _send(url: str, plan: Sequence[PlannedRequest], seed: int) -> list[RequestOutcome]:
    async with ServingClient(url, None, REQUEST_TIMEOUT_S) as client:
        style = RequestStyle(Endpoint.COMPLETIONS, await client.first_model(), temperature=0.0, ignore_eos=True)
        prompts = PromptMaker(seed, *TOKEN_IDS)
        load = await run_load(client, style, plan, prompts, None, Progress(sys.stderr, len(plan)))
        return load.outcomes


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """A cluster of one prefill and one decode worker of one thread each; its address. Ended with Ctrl-C.

    Raises:
        StartupError: it does not start; says its last words.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    pools = ("--prefill-workers", "1", "--decode-workers", "1", "--threads-per-worker", "1")
    command = [sys.executable, "-m", "engine.cli", "serve", "--port", str(port), *pools, *arguments]
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            if not _becomes_ready(server, url):
                output.seek(0)
                raise StartupError(f"The cluster did not start: {output.read()[-500:].decode(errors='replace')}")
            yield url
        finally:
            _stop(server)


def read_cluster(url: str) -> ClusterSnapshot:
    with urllib.request.urlopen(f"{url}/cluster", timeout=10) as response:
        return TypeAdapter(ClusterSnapshot).validate_json(response.read())


def _becomes_ready(server: subprocess.Popen[bytes], url: str) -> bool:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline_s:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/ready", timeout=2):
            return True
        time.sleep(0.2)
    return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGINT)
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.scheduler_cost", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=75.0, help="length of the load (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the load (default: %(default)s)")
    parser.add_argument("--mix", choices=tuple(MIXES), default=DEFAULT_MIX, help="of requests (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    flags: argparse.Namespace = parser.parse_args(arguments)
    result = measure_cost_error(flags.seconds, flags.seed, flags.mix)
    print(f"TTFT {result.ttft_median:.1%}, TPOT {result.tpot_median:.1%} median error, {result.requests} requests")
    for worker_id, errors in result.workers.items():
        print(f"{worker_id}: {errors}")
    write_json(flags.json, {**describe_run("ray"), "cost_model_error": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
