"""`twinpool status`: the workers of a running cluster as a table."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

import orjson
from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from kvcache.errors import TwinpoolError, UnavailableError
from scheduler.types import ClusterSnapshot, WorkerSnapshot

TIMEOUT_S = 5.0
NUMBERS = ("GFLOP/s", "GB/s", "KV used", "KV free", "running", "waiting")
WIDTH_OFF_TERMINAL = 120


def show_status(url: str, api_key: str | None, *, as_json: bool) -> None:
    """Asks a running server and prints what it says.

    Raises:
        UnavailableError: nobody answers at ``url``.
        TwinpoolError: the answer is a refusal, or not from Twinpool.
    """
    if "://" not in url:
        url = f"http://{url}"
    if not url.startswith(("http://", "https://")):
        raise TwinpoolError(f"{url!r} is no http address.")
    body = _fetch(url.rstrip("/") + "/cluster", api_key)
    try:
        cluster = TypeAdapter(ClusterSnapshot).validate_json(body)
    except ValidationError:
        raise TwinpoolError(f"What answers at {url} is not this version of Twinpool.") from None
    if as_json:
        sys.stdout.write(orjson.dumps(cluster, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        console = Console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = Console(width=WIDTH_OFF_TERMINAL)
        console.print(status_table(cluster))


def status_table(cluster: ClusterSnapshot) -> Table:
    """One row per worker, and one for each that is away."""
    table = Table(title=_title(cluster), caption=_errors(cluster), box=box.SIMPLE)
    for column in ("worker", "role"):
        table.add_column(column, no_wrap=True)
    for column in NUMBERS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("address", overflow="fold")
    for worker in cluster.workers:
        table.add_row(*_row(worker))
    for worker_id in cluster.missing:
        table.add_row(worker_id, "away", style="red")
    return table


def _title(cluster: ClusterSnapshot) -> str:
    if not cluster.workers:
        return "no workers"
    info = cluster.workers[0].info
    specs = dict.fromkeys((worker.info.spec.dtype, worker.info.spec.block_size) for worker in cluster.workers)
    kv = " and ".join(f"{dtype}, blocks of {block_size} tokens" for dtype, block_size in specs)
    return f"{info.model}, context {info.max_model_len}, KV in {kv}"


def _row(worker: WorkerSnapshot) -> tuple[str, ...]:
    info, load = worker.info, worker.load
    return (
        info.worker_id,
        info.role.value if info.tensor_parallel_size == 1 else f"{info.role.value} x{info.tensor_parallel_size}",
        f"{info.device.gemm_gflop_s:.0f}",
        f"{info.device.read_gb_s:.1f}",
        str(info.num_blocks - load.blocks_free),
        str(load.blocks_free),
        str(load.running),
        str(load.waiting),
        info.address,
    )


def _errors(cluster: ClusterSnapshot) -> str | None:
    """How far off predictions were in the middle, of those workers whose requests have shown it."""
    told = []
    for worker in cluster.workers:
        errors = (("TTFT", worker.errors.ttft), ("TPOT", worker.errors.tpot))
        known = [f"{name} {error:.0%}" for name, error in errors if error is not None]
        if known:
            told.append(f"{worker.info.worker_id} {', '.join(known)}")
    return f"predictions off by (median): {'; '.join(told)}" if told else None


def _fetch(address: str, api_key: str | None) -> bytes:
    request = urllib.request.Request(address)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            body: bytes = response.read()
    except urllib.error.HTTPError as error:
        hint = "; give the server's key with --api-key" if error.code == 401 else ""
        raise TwinpoolError(f"{address} answered {error.code} {error.reason}{hint}.") from None
    except (urllib.error.URLError, OSError) as error:
        raise UnavailableError(f"Nobody answers at {address} ({getattr(error, 'reason', error)}).") from None
    return body
