"""The mixed load of chats and long prompts against several servers, one after the other, in rounds.

The load is a script of its own, which knows nothing of us; here servers are started, waited for and ended.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import orjson
from prometheus_client.parser import text_string_to_metric_families

from kvcache.errors import ConfigError, ResourceError

Numbers = dict[str, float | None]
_Key = TypeVar("_Key")
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
STAGES = "twinpool_request_stage_seconds"
LEAST_GOODPUT = 0.9  # of a rate that a server can take
_OWN = (
    f"{shlex.quote(sys.executable)} -m engine.cli serve --dtype float32 --port {{port}}"
    " --ttft-target-ms {ttft_ms} --tpot-target-ms {tpot_ms}"
)
OWN_SERVERS = {
    "two_pools": f"{_OWN} --prefill-workers 1 --decode-workers 1 --threads-per-worker 1",
    "colocated": f"{_OWN} --colocated 1 --threads-per-worker 2",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A server to load. ``command`` is empty for one that runs already."""

    name: str
    url: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """What the script is told."""

    script: Path
    seconds: float
    chat_rate: float
    long_rate: float
    ttft_ms: float
    tpot_ms: float


def targets(
    own: Sequence[str], peers: Sequence[str], port: int, ttft_ms: float = 1500.0, tpot_ms: float = 120.0
) -> list[Target]:
    """Our servers by name, which are told the targets; peers as ``NAME=COMMAND`` (with ``{port}``) or ``NAME=URL``.

    Raises:
        ConfigError: an unknown name, or a peer that is neither.
    """
    found = []
    for name in own:
        if name not in OWN_SERVERS:
            raise ConfigError(f"there is no server {name!r} of our own; there are {', '.join(OWN_SERVERS)}")
        command = OWN_SERVERS[name].replace("{ttft_ms}", f"{ttft_ms:g}").replace("{tpot_ms}", f"{tpot_ms:g}")
        found.append(_target(name, command, port))
    for peer in peers:
        name, equals, what = peer.partition("=")
        if not name or not equals or not what:
            raise ConfigError(f"--peer is {peer!r}; it must be NAME=URL, or NAME=COMMAND with {{port}} in it")
        found.append(_target(name, what, port))
    names = [target.name for target in found]
    if len(set(names)) != len(names):
        raise ConfigError(f"two servers have the same name: {', '.join(names)}")
    return found


def _target(name: str, what: str, port: int) -> Target:
    if what.startswith(("http://", "https://")):
        return Target(name, what.rstrip("/"))
    if "{port}" not in what:
        raise ConfigError(f"the command of {name} does not say {{port}}, where its port must stand")
    return Target(name, f"http://127.0.0.1:{port}", what.replace("{port}", str(port)))


def measure_mixed(servers: Sequence[Target], load: MixedLoad, rounds: int) -> Iterator[dict[str, dict[str, object]]]:
    """After each round, of each server the median over the rounds so far, and all of them.

    Raises:
        ResourceError: a server did not start, or the script failed.
    """
    runs: dict[str, list[Numbers]] = {server.name: [] for server in servers}
    for number in range(rounds):
        for server in servers:
            print(f"mixed, round {number + 1} of {rounds}: {server.name}", file=sys.stderr, flush=True)
            with running(server):
                numbers = run_load(server.url, load, seed=number)
                runs[server.name].append(numbers | stage_times(_page(f"{server.url}/metrics")))
        yield {name: {"median": medians(of_one), "rounds": of_one} for name, of_one in runs.items()}


def measure_capacity(
    servers: Sequence[Target], load: MixedLoad, chat_rates: Sequence[float]
) -> dict[str, dict[str, object]]:
    """Of each server the highest of the rates of chats, tried from the lowest up, with goodput ``LEAST_GOODPUT``.

    Raises:
        ResourceError: as ``measure_mixed``.
    """
    found: dict[str, dict[str, object]] = {}
    for server in servers:
        runs: dict[str, Numbers] = {}
        highest: float | None = None
        with running(server):
            for rate in chat_rates:
                print(f"capacity: {server.name} at {rate} chats per second", file=sys.stderr, flush=True)
                runs[str(rate)] = numbers = run_load(server.url, replace(load, chat_rate=rate), seed=0)
                if (numbers["goodput"] or 0.0) < LEAST_GOODPUT:
                    break
                highest = rate
        found[server.name] = {"highest_chat_rate": highest, "runs": runs}
    return found


def medians(runs: Sequence[Mapping[_Key, float | None]]) -> dict[_Key, float | None]:
    """Key by key, over the rounds that have the number."""
    keys = dict.fromkeys(key for run in runs for key in run)
    known = {key: [value for run in runs if (value := run.get(key)) is not None] for key in keys}
    return {key: statistics.median(values) if values else None for key, values in known.items()}


def run_load(url: str, load: MixedLoad, seed: int) -> Numbers:
    arguments = [
        *("--seconds", load.seconds, "--chat-rate", load.chat_rate, "--long-rate", load.long_rate),
        *("--ttft", load.ttft_ms, "--tpot", load.tpot_ms, "--seed", seed),
    ]
    command = [sys.executable, str(load.script), url, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=load.seconds + 900, check=False)
    try:
        numbers: Numbers = orjson.loads(done.stdout.splitlines()[-1])
    except (IndexError, orjson.JSONDecodeError):
        raise ResourceError(f"{load.script.name} failed on {url}: {done.stderr[-500:]}") from None
    return numbers


def stage_times(exposition: str) -> Numbers:
    """How long requests were in each stage: median and 95th percentile in milliseconds, between the histogram's bounds
    in proportion, as Prometheus does it. Empty for a server that tells nothing of stages.
    """
    counts: dict[str, list[tuple[float, float]]] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == f"{STAGES}_bucket":
                of_stage = counts.setdefault(sample.labels["stage"], [])
                of_stage.append((float(sample.labels["le"]), sample.value))
    quantiles = (("p50", 0.5), ("p95", 0.95))
    return {
        f"stage_{stage}_{name}": round(1000 * _quantile(buckets, share), 1)
        for stage, buckets in counts.items()
        for name, share in quantiles
    }


def _quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """Of (bound, observations up to it), the last of them without end."""
    rank = share * buckets[-1][1]
    below_s, below = 0.0, 0.0
    for bound_s, count in buckets[:-1]:
        if count >= rank:
            return below_s + (bound_s - below_s) * (rank - below) / (count - below) if count > below else bound_s
        below_s, below = bound_s, count
    return below_s


@contextlib.contextmanager
def running(server: Target) -> Iterator[None]:
    """Starts the server, unless it runs already, and ends all its processes afterwards."""
    if not server.command:
        yield
        return
    with tempfile.NamedTemporaryFile("w+") as output:
        process = subprocess.Popen(
            shlex.split(server.command), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_ready(server, process, output.name)
            yield
        finally:
            _end(process)


def _wait_until_ready(server: Target, process: subprocess.Popen[bytes], output: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(server.url):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = Path(output).read_text(errors="replace")[-500:]
            raise ResourceError(f"{server.name} did not start: {tail}")
        time.sleep(0.5)


def _answers(url: str) -> bool:
    return bool(_page(f"{url}/v1/models"))


def _page(url: str) -> str:
    """Empty where there is none."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return bytes(response.read()).decode()
    except (urllib.error.URLError, OSError):
        return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would; whoever is left in its session after a while is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
