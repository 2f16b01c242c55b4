"""Starts the cluster and the HTTP server, and ends both without leaving anything behind.

What takes long is done side by side: Ray starts while the checkpoint is described, for which transformers and torch are
imported, and the HTTP part is imported while the workers load. So this module imports neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from engine.autoscaling import Autoscaling
from engine.config import ServeConfig
from engine.fleet import Fleet, RunningCluster
from engine.machine_limits import is_loopback
from engine.node_requests import SharedNodeRequests
from engine.ray_session import (
    check_interrupted,
    cluster_nodes,
    interrupt_on_signals,
    joined_cluster,
    ray_session,
)
from engine.start_progress import StartProgress, start_progress
from engine.startup import StartupPlan, bind_server_socket, check_installation, make_plan
from kvcache.errors import ResourceError
from kvcache.spec import KVCacheSpec
from scheduler.garbage import collect_rarely
from scheduler.ray_actor import PolledScheduler, start_scheduler
from scheduler.types import DeviceProfile, WorkerInfo, WorkerRole
from workers.load_progress import LoadProgress
from workers.model.checkpoint import prepare_checkpoint
from workers.ray_worker import RayWorker
from workers.tls import TlsFolder
from workers.worker_options import WorkerOptions

START_TIMEOUT_S = 900.0  # until all workers are loaded, the wait for room in a busy cluster included
START_POLL_INTERVAL_S = 0.05
logger = logging.getLogger(__name__)


def serve(config: ServeConfig) -> None:
    """Runs until SIGINT or SIGTERM.

    Raises:
        StartupError: one sentence; nothing is left running.
    """
    interrupt_on_signals()
    check_installation()
    gc.disable()  # imports make a million objects that stay: looking for garbage among them costs a second
    with (
        contextlib.closing(bind_server_socket(config.host, config.port)) as server_socket,
        ThreadPoolExecutor(1, "start") as beside,
        contextlib.ExitStack() as cluster,
    ):
        path = prepare_checkpoint(config.model)
        with start_progress() as progress:
            plan = cluster.enter_context(_ray_and_plan(config, path, beside))
            plan = cluster.enter_context(_with_tls(config, plan))
            _check_gpus(plan)
            _log_model(plan)
            preparing = beside.submit(_prepare_http, plan)
            running = cluster.enter_context(_running_cluster(plan, config, progress, preparing))
            serve_http = preparing.result()
        collect_rarely()
        try:
            asyncio.run(serve_http(config, plan, running, server_socket))
        finally:
            interrupt_on_signals()  # the event loop has taken its own handlers away


@contextlib.contextmanager
def _ray_and_plan(config: ServeConfig, path: Path, beside: ThreadPoolExecutor) -> Iterator[StartupPlan]:
    """Ray, and what will be started on it. A cluster of our own starts while the plan is made; one that is joined is
    asked first what it has."""
    if config.address is not None:
        with joined_cluster(config.address):
            yield make_plan(config, path, cluster_nodes())
        return
    planning = beside.submit(make_plan, config, path)
    with ray_session(1 + config.num_ranks):  # with the scheduler
        yield planning.result()


@contextlib.contextmanager
def _with_tls(config: ServeConfig, plan: StartupPlan) -> Iterator[StartupPlan]:
    """The plan with a folder of certificates for every process, if it is to have them."""
    if config.grpc_tls_dir is not None:
        given = TlsFolder(str(config.grpc_tls_dir.resolve()))
        given.channel_credentials()  # can be read
        yield _plan_with_tls(plan, given, given)
    elif config.grpc_tls:
        from engine.certificates import throw_away_certificates

        with throw_away_certificates(("gateway", "worker")) as folder:
            yield _plan_with_tls(plan, TlsFolder(str(folder / "gateway")), TlsFolder(str(folder / "worker")))
    else:
        yield plan


def _plan_with_tls(plan: StartupPlan, gateway: TlsFolder, worker: TlsFolder) -> StartupPlan:
    workers = tuple(replace(options, tls_folder=worker.path) for options in plan.workers)
    return replace(plan, workers=workers, gateway_tls=gateway)


def _check_gpus(plan: StartupPlan) -> None:
    """A worker that Ray has no GPU for would never start."""
    found = int(ray.cluster_resources().get("GPU", 0)) if plan.num_gpus else 0
    if plan.num_gpus > found:
        raise ResourceError(f"The workers need {plan.num_gpus} GPUs and Ray finds {found}; start fewer workers.")


def _prepare_http(plan: StartupPlan) -> Any:
    """The coroutine function that serves, imported and with its tokenizer loaded."""
    from engine.http_server import serve_http
    from engine.tokenizer import Tokenizer

    return functools.partial(serve_http, Tokenizer.from_checkpoint(plan.checkpoint.path))


@contextlib.contextmanager
def _running_cluster(
    plan: StartupPlan, config: ServeConfig, progress: StartProgress, preparing: Future[Any]
) -> Iterator[RunningCluster]:
    """The scheduler with all workers loaded, measured and registered; if ``preparing`` fails meanwhile, its error."""
    worker_ids = [options.worker_id for options in plan.workers]
    scheduler = start_scheduler(worker_ids, config.placement, config.admission(plan.tenants.weights))
    fleet = Fleet(plan.workers, RayWorker, PolledScheduler(scheduler), autoscaling=_autoscaling(config))
    try:
        _await_workers(plan, fleet, progress, preparing)
        fleet.start_thread()
        yield RunningCluster(scheduler, fleet)
    finally:
        fleet.close(config.shutdown_timeout)


def _autoscaling(config: ServeConfig) -> Autoscaling | None:
    if not config.pool_limits:
        return None
    placement = config.placement
    targets = {WorkerRole.PREFILL: placement.ttft_target_s, WorkerRole.DECODE: placement.tpot_target_s}
    return Autoscaling(config.pool_limits, targets, SharedNodeRequests())


def _await_workers(plan: StartupPlan, fleet: Fleet, progress: StartProgress, preparing: Future[Any]) -> None:
    """Returns when all have registered. At the start the first failure is the end: it would come again."""
    started = time.monotonic()
    logger.info("Starting workers: %s", ", ".join(fleet.members))
    progress.stage(f"Loading weights on {len(fleet.members)} workers" if len(fleet.members) > 1 else "Loading weights")
    told: set[str] = set()
    is_loaded = False
    while not fleet.is_complete:
        fleet.step(joining=is_loaded)
        check_interrupted()
        if preparing.done():
            preparing.result()  # raises what went wrong, before minutes of loading are lost
        _check_start(fleet, time.monotonic() - started)
        progress.load(sum(member.progress.part for member in fleet.members.values()) / len(fleet.members))
        if not is_loaded and fleet.is_loaded:
            is_loaded = True
            _log_loaded(plan, [member.progress for member in fleet.members.values()])
        for member in fleet.members.values():
            if member.info is not None and member.worker_id not in told:
                told.add(member.worker_id)
                _log_worker(member.info, member.options)
        time.sleep(START_POLL_INTERVAL_S)
    if plan.gateway_tls is None:
        _warn_of_open_ports([member.info for member in fleet.members.values() if member.info is not None])
    logger.info("Workers ready after %.1f s", time.monotonic() - started)


def _check_start(fleet: Fleet, elapsed_s: float) -> None:
    for member in fleet.members.values():
        if member.num_starts and member.process is None:
            raise ResourceError(f"A worker could not start: {member.failure or 'its process has ended'}")
    if elapsed_s > START_TIMEOUT_S:
        late = [member for member in fleet.members.values() if member.info is None]
        without_room = [member.worker_id for member in late if member.process and not member.process.has_room()]
        reason = f"; Ray has no room yet for {', '.join(without_room)}" if without_room else ""
        raise ResourceError(f"{len(late)} workers have not started within {START_TIMEOUT_S:g} s{reason}.")


def _warn_of_open_ports(workers: Sequence[WorkerInfo]) -> None:
    """Whoever can reach a worker's port can call it, past the API key."""
    reachable = [info.address for info in workers if not is_loopback(info.address)]
    if reachable:
        logger.warning(
            "Workers listen on %s without TLS: keep these ports inside a network that you trust.", ", ".join(reachable)
        )


def _log_model(plan: StartupPlan) -> None:
    checkpoint = plan.checkpoint
    logger.info(
        "%s: %.1f M parameters, computed in %s",
        checkpoint.architecture,
        checkpoint.num_parameters / 1e6,
        checkpoint.dtype,
    )


def _log_loaded(plan: StartupPlan, loaded: Sequence[LoadProgress]) -> None:
    logger.info(
        "Weights loaded: %.0f MiB per worker in %.1f s",
        plan.checkpoint.weight_bytes / (1 << 20),
        max(state.load_seconds for state in loaded),
    )
    for options in {worker.role: worker for worker in plan.workers}.values():
        if options.num_blocks is not None:
            kv_cache = _kv_cache(options.num_blocks, options.spec, plan.max_model_len)
            logger.info("KV cache per %s worker: %s", options.role.value, kv_cache)


def _kv_cache(num_blocks: int, spec: KVCacheSpec, max_model_len: int) -> str:
    concurrency = num_blocks * spec.block_size / max_model_len
    return (
        f"{num_blocks} blocks of {spec.block_size} tokens in {spec.dtype};"
        f" maximum concurrency for {max_model_len} tokens: {concurrency:.1f}"
    )


def _log_worker(info: WorkerInfo, options: WorkerOptions) -> None:
    device = info.device
    ranks = f"{info.tensor_parallel_size} ranks, " if info.tensor_parallel_size > 1 else ""
    logger.info(
        "%s on %s: %s%.0f GFLOP/s, %.1f GB/s %s",
        info.worker_id,
        info.address,
        ranks,
        device.gemm_gflop_s,
        device.read_gb_s,
        _device(options, device),
    )
    if options.num_blocks is None:
        logger.info("%s: KV cache of %s", info.worker_id, _kv_cache(info.num_blocks, info.spec, info.max_model_len))


def _device(options: WorkerOptions, device: DeviceProfile) -> str:
    if options.device_profile is not None:
        return f"taken for {device.name}"
    return f"on {device.name}" if options.device == "cuda" else f"with {device.num_threads} threads"
