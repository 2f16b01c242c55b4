"""`twinpool status`: the workers of a running cluster as a table."""

from __future__ import annotations

import os
import sys

import orjson
from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from engine.http_call import base_url, call_server
from kvcache.errors import TwinpoolError
from scheduler.types import ClusterSnapshot, DutyState, WorkerSnapshot

NUMBERS = ("GFLOP/s", "GB/s", "KV used", "KV free", "running", "waiting")
WIDTH_OFF_TERMINAL = 120


def show_status(url: str, api_key: str | None, *, as_json: bool) -> None:
    """Asks a running server and prints what it says.

    Raises:
        UnavailableError: nobody answers at ``url``.
        TwinpoolError: the answer is a refusal, or not from Twinpool.
    """
    cluster = parse_cluster(call_server(f"{base_url(url)}/cluster", api_key), url)
    if as_json:
        sys.stdout.write(orjson.dumps(cluster, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        console = Console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = Console(width=WIDTH_OFF_TERMINAL)
        console.print(status_table(cluster))


def parse_cluster(body: bytes, url: str) -> ClusterSnapshot:
    """
    Raises:
        TwinpoolError: this is no view of a cluster.
    """
    try:
        return TypeAdapter(ClusterSnapshot).validate_json(body)
    except ValidationError:
        raise TwinpoolError(f"What answers at {url} is not this version of Twinpool.") from None


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


def _role(worker: WorkerSnapshot) -> str:
    """With the number of its ranks, and what it is on its way to."""
    info, duty = worker.info, worker.duty
    ranks = f" x{info.tensor_parallel_size}" if info.tensor_parallel_size > 1 else ""
    state = f", {duty.state.value}" if duty.state is not DutyState.ACTIVE else ""
    target = f" to {duty.next_role.value}" if duty.next_role is not None else ""
    return f"{info.role.value}{ranks}{state}{target}"


def _row(worker: WorkerSnapshot) -> tuple[str, ...]:
    info, load = worker.info, worker.load
    return (
        info.worker_id,
        _role(worker),
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
