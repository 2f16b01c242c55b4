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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from engine.config import ServeConfig
from engine.ray_session import check_interrupted, interrupt_on_signals, ray_session
from engine.start_progress import StartProgress, start_progress
from engine.startup import StartupPlan, bind_server_socket, check_installation, make_plan
from kvcache.errors import ResourceError, TwinpoolError
from kvcache.spec import KVCacheSpec
from scheduler.ray_actor import ActorHandle, start_scheduler
from scheduler.types import WorkerInfo
from workers.load_progress import LoadProgress
from workers.model.checkpoint import prepare_checkpoint
from workers.ray_worker import start_worker
from workers.worker_options import WorkerOptions

START_TIMEOUT_S = 900.0  # to load all workers; Ray restarts one that crashes, so a crash alone does not end the wait
POLL_INTERVAL_S = 0.1
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
            planning = beside.submit(make_plan, config, path)
            cluster.enter_context(ray_session(1 + config.num_workers))  # with the scheduler
            plan = planning.result()
            _check_gpus(plan)
            _log_model(plan)
            preparing = beside.submit(_prepare_http, plan)
            scheduler = cluster.enter_context(_running_cluster(plan, config, progress))
            serve_http = preparing.result()
        gc.freeze()
        gc.enable()
        try:
            asyncio.run(serve_http(config, plan, scheduler, server_socket))
        finally:
            interrupt_on_signals()  # the event loop has taken its own handlers away


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
def _running_cluster(plan: StartupPlan, config: ServeConfig, progress: StartProgress) -> Iterator[ActorHandle]:
    """The scheduler with all workers loaded, measured and registered."""
    scheduler = start_scheduler([options.worker_id for options in plan.workers], config.placement)
    workers = {options.worker_id: start_worker(options) for options in plan.workers}
    try:
        _await_workers(plan, workers, progress)
        yield scheduler
    finally:
        _stop_workers(workers, config.shutdown_timeout)


def _await_workers(plan: StartupPlan, workers: dict[str, ActorHandle], progress: StartProgress) -> None:
    started = time.monotonic()
    logger.info("Starting workers: %s", ", ".join(workers))
    try:
        loaded = _await_loaded(workers, progress)
        _log_loaded(plan, loaded)
        for options in plan.workers:  # one after the other: they share the machine that they measure
            _log_worker(ray.get(workers[options.worker_id].join.remote()), options)
    except RayTaskError as error:
        if isinstance(error.cause, TwinpoolError):
            raise ResourceError(f"A worker could not start: {error.cause}") from None
        raise ResourceError(f"A worker could not start: {error}") from error
    except RayError as error:
        raise ResourceError(f"A worker process could not start: {error}") from error
    logger.info("Workers ready after %.1f s", time.monotonic() - started)


def _await_loaded(workers: dict[str, ActorHandle], progress: StartProgress) -> dict[str, LoadProgress]:
    """Asks all how far they are until all are ready; the first failure is raised at once."""
    progress.stage(f"Loading weights on {len(workers)} workers" if len(workers) > 1 else "Loading weights")
    deadline = time.monotonic() + START_TIMEOUT_S
    known = dict.fromkeys(workers, LoadProgress())
    asked: dict[ray.ObjectRef[LoadProgress], str] = {}
    while not all(state.is_ready for state in known.values()):
        for worker_id in set(known).difference(asked.values()):
            if not known[worker_id].is_ready:
                asked[workers[worker_id].progress.remote()] = worker_id
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_INTERVAL_S)
        for answer in answered:
            known[asked.pop(answer)] = ray.get(answer)
        progress.load(sum(state.part for state in known.values()) / len(known))
        check_interrupted()
        if time.monotonic() > deadline:
            late = sum(not state.is_ready for state in known.values())
            raise ResourceError(f"{late} workers have not started within {START_TIMEOUT_S:g} s.")
        time.sleep(POLL_INTERVAL_S)
    return known


def _stop_workers(workers: dict[str, ActorHandle], timeout_s: float) -> None:
    """Asks all to stop; whoever does not in time is killed with the session."""
    stopping = [worker.stop.remote() for worker in workers.values()]
    with contextlib.suppress(RayError):  # a worker that is dead already has stopped
        ray.wait(stopping, num_returns=len(stopping), timeout=timeout_s)


def _log_model(plan: StartupPlan) -> None:
    checkpoint = plan.checkpoint
    logger.info(
        "%s: %.1f M parameters, computed in %s",
        checkpoint.architecture,
        checkpoint.num_parameters / 1e6,
        checkpoint.dtype,
    )


def _log_loaded(plan: StartupPlan, loaded: dict[str, LoadProgress]) -> None:
    logger.info(
        "Weights loaded: %.0f MiB per worker in %.1f s",
        plan.checkpoint.weight_bytes / (1 << 20),
        max(state.load_seconds for state in loaded.values()),
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
        f"on {device.name}" if options.device == "cuda" else f"with {device.num_threads} threads",
    )
    if options.num_blocks is None:
        logger.info("%s: KV cache of %s", info.worker_id, _kv_cache(info.num_blocks, info.spec, info.max_model_len))
