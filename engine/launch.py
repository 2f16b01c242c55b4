"""Starts the cluster and the HTTP server, and ends both without leaving anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import ray
import uvicorn
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from engine.activity_log import log_activity
from engine.api.app import create_app
from engine.config import ServeConfig
from engine.gateway import AsyncEngine
from engine.metrics import Metrics
from engine.outputs import ServedModel
from engine.process_tree import adopt_orphans, end_children
from engine.scheduler_client import SchedulerClient
from engine.startup import StartupPlan, bind_server_socket, check_installation, make_plan
from engine.tokenizer import Tokenizer
from kvcache.errors import ResourceError, TwinpoolError
from scheduler.ray_actor import ActorHandle, RayScheduler, start_scheduler
from scheduler.types import WorkerInfo
from workers.ray_worker import start_worker

OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum: no token and no KV goes through it
START_TIMEOUT_S = 900.0  # to load all workers; Ray restarts one that crashes, so a crash alone does not end the wait
END_GRACE_S = 5  # for the error frames of requests that did not end in time
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
logger = logging.getLogger(__name__)


def serve(config: ServeConfig) -> None:
    """Runs until SIGINT or SIGTERM.

    Raises:
        StartupError: one sentence; nothing is left running.
    """
    _interrupt_on_signals()
    check_installation()
    with contextlib.closing(bind_server_socket(config.host, config.port)) as server_socket:
        plan = make_plan(config)
        _log_plan(plan)
        tokenizer = Tokenizer.from_checkpoint(plan.checkpoint.path)
        with _ray_session(), _running_cluster(plan, config.shutdown_timeout) as scheduler:
            try:
                asyncio.run(_serve_http(config, plan, tokenizer, scheduler, server_socket))
            finally:
                _interrupt_on_signals()  # the event loop has taken its own handlers away


def _interrupt_on_signals() -> None:
    """Whatever ends this process early goes through the clean-up below."""
    for signum in END_SIGNALS:
        signal.signal(signum, _interrupt)


_interrupted = threading.Event()


def _interrupt(signum: int, _frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def _check_interrupted() -> None:
    """An exception raised inside a library's callback may be lost there; the flag is not."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _ray_session() -> Iterator[None]:
    """A Ray cluster of our own on this machine, with a token, in a folder that goes away with it."""
    # Short: the paths of Ray's sockets below it may not exceed 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="twinpool-"))
    adopt_orphans()
    try:
        try:
            ray.init(
                address="local",
                namespace="twinpool",
                num_cpus=1,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
                _temp_dir=str(folder),
            )
        except (RayError, OSError, RuntimeError, ValueError) as error:
            raise ResourceError(f"Ray could not start: {error}") from error
        _check_interrupted()
        yield
    finally:
        ray.shutdown()
        end_children()  # agents of a session that ended while it began
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _running_cluster(plan: StartupPlan, shutdown_timeout_s: float) -> Iterator[ActorHandle]:
    """The scheduler with all workers loaded, measured and registered."""
    scheduler = start_scheduler([options.worker_id for options in plan.workers])
    workers = {options.worker_id: start_worker(options) for options in plan.workers}
    try:
        _await_workers(workers)
        yield scheduler
    finally:
        _stop_workers(workers, shutdown_timeout_s)


def _await_workers(workers: dict[str, ActorHandle]) -> None:
    started = time.monotonic()
    logger.info("Starting workers: %s", ", ".join(workers))
    try:
        _await_all([worker.ready.remote() for worker in workers.values()], "Loading workers")
        for worker in workers.values():  # one after the other: they share the machine that they measure
            _log_worker(ray.get(worker.join.remote()))
    except RayTaskError as error:
        if isinstance(error.cause, TwinpoolError):
            raise ResourceError(f"A worker could not start: {error.cause}") from None
        raise ResourceError(f"A worker could not start: {error}") from error
    except RayError as error:
        raise ResourceError(f"A worker process could not start: {error}") from error
    logger.info("Ready after %.1f s", time.monotonic() - started)


def _await_all(pending: list[ray.ObjectRef[None]], label: str) -> None:
    """Waits for all; the first failure is raised at once. A bar counts them on a terminal."""
    deadline = time.monotonic() + START_TIMEOUT_S
    with tqdm(total=len(pending), desc=label, disable=not sys.stderr.isatty(), leave=False) as bar:
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=1.0)
            _check_interrupted()
            if not done and time.monotonic() > deadline:
                raise ResourceError(f"{len(pending)} workers have not started within {START_TIMEOUT_S:g} s.")
            ray.get(done)
            bar.update(len(done))


def _stop_workers(workers: dict[str, ActorHandle], timeout_s: float) -> None:
    """Asks all to stop; whoever does not in time is killed with the session."""
    stopping = [worker.stop.remote() for worker in workers.values()]
    with contextlib.suppress(RayError):  # a worker that is dead already has stopped
        ray.wait(stopping, num_returns=len(stopping), timeout=timeout_s)


async def _serve_http(
    config: ServeConfig,
    plan: StartupPlan,
    tokenizer: Tokenizer,
    scheduler: ActorHandle,
    server_socket: socket.socket,
) -> None:
    client = SchedulerClient(RayScheduler(scheduler))
    await client.start()
    engine = AsyncEngine(_served_model(config, plan), tokenizer, client)
    metrics = Metrics(engine.model.names[0], lambda: engine.cluster)
    app = create_app(engine, api_keys=config.api_key, metrics=metrics)
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=round(config.shutdown_timeout) + END_GRACE_S,
        ),
        engine,
        config.shutdown_timeout,
    )
    logging_activity = asyncio.create_task(log_activity(engine))
    announcing = asyncio.create_task(_announce(server, config))
    try:
        for signum in END_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(signum, server.stop)
        await server.serve(sockets=[server_socket])
    finally:
        logging_activity.cancel()
        announcing.cancel()
        await engine.close()
        await client.stop()


class _Server(uvicorn.Server):
    """Ends on our word: uvicorn's own handlers raise the signal once more after a clean end."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, shutdown_timeout_s: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._shutdown_timeout_s = shutdown_timeout_s
        self._num_stops = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """The first call lets running requests end for a while, the second ends them with an error, the third cuts."""
        self._num_stops += 1
        self.should_exit = True
        if self._num_stops == 1:
            logger.info("Stopping; running requests get %g s (Ctrl-C again: none)", self._shutdown_timeout_s)
            asyncio.get_running_loop().call_later(self._shutdown_timeout_s, self._engine.end_requests)
        elif self._num_stops == 2:
            self._engine.end_requests()
        else:
            self.force_exit = True


def _served_model(config: ServeConfig, plan: StartupPlan) -> ServedModel:
    return ServedModel(
        (config.served_name,),
        plan.max_model_len,
        int(time.time()),
        plan.checkpoint.eos_token_ids,
        plan.checkpoint.vocab_size,
    )


async def _announce(server: uvicorn.Server, config: ServeConfig) -> None:
    """Says how to try it, as soon as a request would be answered."""
    while not server.started:  # noqa: ASYNC110  uvicorn offers no event
        await asyncio.sleep(0.05)
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{config.port}"
    model = config.served_name
    key = ' -H "Authorization: Bearer $TWINPOOL_API_KEY"' if config.api_key else ""
    print(
        f"\nTwinpool serves {model} on {url}\n\n"
        f"  curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "stream": true, "max_tokens": 64, "temperature": 0,\n'
        f'         "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}\'\n\n'
        f"  {sys.argv[0]} status --url {url}      (Ctrl-C here ends everything)\n",
        flush=True,
    )


def _log_plan(plan: StartupPlan) -> None:
    checkpoint, options = plan.checkpoint, plan.workers[0]
    num_tokens = options.num_blocks * options.spec.block_size
    logger.info(
        "%s: %.1f M parameters, %.0f MiB of %s weights per worker",
        checkpoint.architecture,
        checkpoint.num_parameters / 1e6,
        checkpoint.weight_bytes / (1 << 20),
        checkpoint.dtype,
    )
    logger.info(
        "KV cache per worker: %d blocks of %d tokens; maximum concurrency for %d tokens: %.1f",
        options.num_blocks,
        options.spec.block_size,
        plan.max_model_len,
        num_tokens / plan.max_model_len,
    )


def _log_worker(info: WorkerInfo) -> None:
    ranks = f"{info.tensor_parallel_size} ranks, " if info.tensor_parallel_size > 1 else ""
    logger.info(
        "%s on %s: %s%.0f GFLOP/s, %.1f GB/s with %d threads",
        info.worker_id,
        info.address,
        ranks,
        info.device.gemm_gflop_s,
        info.device.read_gb_s,
        info.device.num_threads,
    )
