"""The HTTP server over a running cluster, from its first request to its last."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator

import uvicorn

from engine.activity_log import log_activity
from engine.admin import Operator
from engine.admin_key import admin_key
from engine.api.app import AdminAccess, create_app
from engine.config import ServeConfig
from engine.fleet import RunningCluster
from engine.gateway import AsyncEngine
from engine.metrics import Metrics
from engine.outputs import ServedModel
from engine.ray_session import cluster_nodes
from engine.scheduler_client import SchedulerClient
from engine.startup import StartupPlan
from engine.tokenizer import Tokenizer
from scheduler.ray_actor import RayScheduler

END_GRACE_S = 5  # for the error frames of requests that did not end in time
KEEP_ALIVE_S = 75  # longer than clients keep idle connections, or a request now and then meets one that is closing
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
logger = logging.getLogger(__name__)


async def serve_http(
    tokenizer: Tokenizer,
    config: ServeConfig,
    plan: StartupPlan,
    running: RunningCluster,
    server_socket: socket.socket,
) -> None:
    """Answers requests until a signal says stop. Imported late: with the API it takes a second."""
    with admin_key(config.admin_key, config.port) as key:
        await _serve(tokenizer, config, plan, running, server_socket, key)


async def _serve(
    tokenizer: Tokenizer,
    config: ServeConfig,
    plan: StartupPlan,
    running: RunningCluster,
    server_socket: socket.socket,
    key: str,
) -> None:
    scheduler = RayScheduler(running.scheduler)
    client = SchedulerClient(scheduler, config.placement, config.admission(plan.tenants.weights))
    await client.start()
    model = _served_model(config, plan)
    metrics = Metrics(model.names[0], lambda: client.cluster)
    engine = AsyncEngine(
        model,
        tokenizer,
        client,
        plan.gateway_tls,
        metrics.observe_queue_time,
        metrics.observe_migration,
        metrics.observe_stages,
    )
    rooms = {options.role: options.room for options in plan.workers}
    nodes = None if config.pool_limits else cluster_nodes
    operator = Operator(scheduler, running.fleet, lambda: client.cluster, plan.worker_bytes, rooms, nodes)
    app = create_app(
        engine,
        api_keys=config.api_key,
        tenants=plan.tenants,
        metrics=metrics,
        admin=AdminAccess(operator, key),
    )
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(config.shutdown_timeout) + END_GRACE_S,
        ),
        engine,
        config.shutdown_timeout,
    )
    logging_activity = asyncio.create_task(log_activity(engine))
    announcing = asyncio.create_task(_announce(server, config, plan))
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


async def _announce(server: uvicorn.Server, config: ServeConfig, plan: StartupPlan) -> None:
    """Says how to try it, as soon as a request would be answered."""
    while not server.started:  # noqa: ASYNC110  uvicorn offers no event
        await asyncio.sleep(0.05)
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{config.port}"
    model = config.served_name
    key = ' -H "Authorization: Bearer $TWINPOOL_API_KEY"' if config.api_key or plan.tenants.keys else ""
    print(
        f"\nTwinpool serves {model} on {url}\n\n"
        f"  curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "stream": true, "max_tokens": 64, "temperature": 0,\n'
        f'         "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}\'\n\n'
        f"  {sys.argv[0]} status --url {url}      (Ctrl-C here ends everything)\n",
        flush=True,
    )
