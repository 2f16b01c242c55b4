"""The Ray shell around a worker: Ray starts, supervises and restarts this process, and carries no token."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kvcache.errors import TwinpoolError, UnavailableError
from kvcache.transfer.allocator import keep_message_buffers
from scheduler.ray_actor import ActorHandle, find_scheduler
from scheduler.types import WorkerInfo
from workers.load_progress import LoadProgress
from workers.membership import Membership
from workers.model.checkpoint import prepare_checkpoint
from workers.worker_options import NODE_ADDRESS, WorkerOptions

if TYPE_CHECKING:
    from workers.worker import Worker

logger = logging.getLogger(__name__)


class WorkerActor:
    """One worker process. Whoever started it asks for ``progress``, then calls ``join``; ``run`` ends with it.

    No method is a coroutine: Ray would run all of them on one event loop, and ``__init__`` not in the main thread,
    where signals come.
    """

    def __init__(self, options: WorkerOptions, incarnation: int) -> None:
        """``incarnation``: how often this worker was started, this time included; whoever starts it counts."""
        _prepare_process(options)
        host = options.host if options.host != NODE_ADDRESS else ray.util.get_node_ip_address()
        self._options = replace(options, host=host)
        self._scheduler = find_scheduler()
        self._incarnation = incarnation
        self._has_stopped = threading.Event()
        self._membership: Membership | None = None
        self._failure: Exception | None = None
        self._worker: Worker | None = None
        self._heartbeats: asyncio.Task[None] | None = None
        # Held, because Ray ends an actor that nobody holds; when this process ends, Ray ends all of them.
        self._followers: list[ActorHandle] = []
        self._progress = LoadProgress()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        # Beside the actor's own thread, so that it can say how far it is.
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def progress(self) -> LoadProgress:
        """How far loading is; returns at once.

        Raises:
            TwinpoolError: why this worker cannot be loaded.
        """
        if self._failure is not None:
            raise self._failure
        return self._progress

    def run(self) -> None:
        """Returns after ``stop``; its caller so hears when this process has ended otherwise."""
        self._has_stopped.wait()

    def _load(self) -> None:
        try:
            self._options = with_checkpoint(self._options)
            build_worker = _import_build_worker()
            started_s = time.monotonic()
            self._worker = worker = build_worker(
                self._options,
                self._start_followers,
                lambda part: self._report(LoadProgress(part, time.monotonic() - started_s)),
            )
            if worker.group is not None:
                worker.group.watch(self._end_process)
            self._event_loop = asyncio.new_event_loop()
            threading.Thread(target=self._event_loop.run_forever, name="worker", daemon=True).start()
            asyncio.run_coroutine_threadsafe(worker.start(), self._event_loop).result()
            self._event_loop.call_soon_threadsafe(self._watch, worker)
            self._report(LoadProgress(1.0, self._progress.load_seconds, is_ready=True))
        except Exception as error:  # the thread's top; progress() raises it where it is read
            logger.debug("Worker %s could not be loaded.", self._options.worker_id, exc_info=error)
            self._failure = error

    def _report(self, progress: LoadProgress) -> None:
        self._progress = progress

    def join(self) -> WorkerInfo:
        """Measures the device, registers with the scheduler and begins to send heartbeats. Called once.

        Called for one worker at a time, so that they do not measure each other.

        Raises:
            ConfigError: the scheduler refuses this worker.
        """
        info = self._loaded.info(self._incarnation, self._loaded.measure())
        if self._options.device == "cpu":  # GPUs have memory and caches of their own
            info = replace(info, node=ray.get_runtime_context().get_node_id())
        self._membership = Membership(self._loaded, self._scheduler, self._end_when_empty)
        self._run_in_worker(self._membership.register(info))
        self._event_loop.call_soon_threadsafe(self._begin_heartbeats, self._membership)
        return info

    def stop(self) -> None:
        """Ends what is running and gives everything back."""
        if self._progress.is_ready:
            if self._heartbeats is not None:
                self._event_loop.call_soon_threadsafe(self._heartbeats.cancel)
            if self._membership is not None:
                self._run_in_worker(self._membership.leave())
            self._run_in_worker(self._loaded.stop())
        self._has_stopped.set()

    def _run_in_worker(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._event_loop).result()

    def _begin_heartbeats(self, membership: Membership) -> None:
        self._heartbeats = asyncio.create_task(membership.send_heartbeats())
        self._heartbeats.add_done_callback(self._end_process_on_failure)

    def _end_when_empty(self) -> None:
        threading.Thread(target=self.stop, name="stop", daemon=True).start()

    def _on_sigterm(self, _signum: int, _frame: FrameType | None) -> None:
        """The first one drains: what runs here ends, and KV is delivered. The second ends the process at once, as the
        first does where nothing runs yet, or any more."""
        membership = self._membership
        if membership is None or membership.info is None or membership.is_leaving or self._has_stopped.is_set():
            os._exit(0)
        membership.leave_when_empty()

    @property
    def _loaded(self) -> Worker:
        assert self._worker is not None, "the launcher waits until a worker is ready"
        return self._worker

    def _watch(self, worker: Worker) -> None:
        worker.stepping.add_done_callback(self._end_process_on_failure)

    def _end_process_on_failure(self, task: asyncio.Task[None]) -> None:
        """A worker that no longer steps, or is no longer heard of, is of no use: a new process is started."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._end_process(f"{type(error).__name__}: {error}", error)

    def _end_process(self, reason: str, error: BaseException | None = None) -> None:
        message = "Worker %s failed (%s); its process ends and is started again."
        logger.critical(message, self._options.worker_id, reason, exc_info=error)
        logging.shutdown()
        os._exit(1)

    def _start_followers(self, address: str) -> Callable[[], bool]:
        """Starts the other ranks beside this process; they are this actor's own, and end when it ends."""
        group = get_current_placement_group()
        assert group is not None, "a worker is started in one"
        actor_class: ActorHandle = ray.remote(FollowerActor)
        self._followers = [
            actor_class.options(**_place_of(rank, group, self._options)).remote(self._options, rank)
            for rank in range(1, self._options.tensor_parallel_size)
        ]
        running = [follower.run.remote(address) for follower in self._followers]
        return lambda: bool(ray.wait(running, timeout=0)[0])


class FollowerActor:
    """One rank beside the leader of a tensor-parallel worker. Not restarted: the leader starts a new group."""

    def __init__(self, options: WorkerOptions, rank: int) -> None:
        _prepare_process(options)
        self._options = options
        self._rank = rank

    def run(self, address: str) -> None:
        """Returns when the leader has ended."""
        from workers.parallel.follower import run_follower  # with torch: see _build_worker

        run_follower(self._options, self._rank, address)


def _prepare_process(options: WorkerOptions) -> None:
    level = options.log_level.upper() if options.log_level != "info" else "WARNING"  # the launcher tells the rest
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    keep_message_buffers()
    # Read by torch and huggingface_hub when they are imported, which is later.
    os.environ["OMP_NUM_THREADS"] = str(options.num_threads)
    if Path(options.model_path).exists():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _import_build_worker() -> Callable[
    [WorkerOptions, Callable[[str], Callable[[], bool]], Callable[[float], None]], Worker
]:
    """Imports torch and transformers here, not with this module: the launcher and a starting process need not wait."""
    gc.disable()  # a million objects come that stay: looking for garbage among them costs a second
    from workers.worker import build_worker

    gc.freeze()
    gc.enable()
    return build_worker


def with_checkpoint(options: WorkerOptions) -> WorkerOptions:
    """The launcher's path where that exists; on another machine the same model is fetched.

    Raises:
        ModelError: it is not here and cannot be fetched.
    """
    if Path(options.model_path).exists() or not options.model_source:
        return options
    return replace(options, model_path=str(prepare_checkpoint(options.model_source, show_progress=False)))


class RayWorker:
    """One process of a worker from its launcher's side: asked for, placed, started, at work, ended.

    Its ranks have a placement group, all on one node; the actor waits until Ray has found room for it. Not restarted by
    Ray, which knows no pause between crashes: see ``engine.fleet``. One thread calls.
    """

    def __init__(self, options: WorkerOptions, incarnation: int) -> None:
        room = options.room
        self._group = placement_group(
            [dict(room.resources) for _ in range(room.num_ranks)],
            strategy="STRICT_PACK",
            bundle_label_selector=[dict(room.labels) for _ in range(room.num_ranks)] if room.labels else None,
        )
        actor_class: ActorHandle = ray.remote(WorkerActor)
        # No runtime environment: it would keep Ray from taking one of the processes that it has started already.
        self._actor = actor_class.options(
            max_concurrency=4,  # it says how far it is while ``run`` waits and ``join`` measures
            **_place_of(0, self._group, options),
        ).remote(options, incarnation)
        self._running = self._actor.run.remote()
        self._asked: ray.ObjectRef[LoadProgress] | None = None
        self._joining: ray.ObjectRef[WorkerInfo] | None = None

    def progress(self) -> LoadProgress | None:
        """The newest answer, or None when there is no new one.

        Raises:
            TwinpoolError: why it cannot be loaded.
            UnavailableError: the process has ended.
        """
        if self._asked is None:
            self._asked = self._actor.progress.remote()
        if not _is_answered(self._asked):
            return None
        asked, self._asked = self._asked, None
        return _result(asked)

    def join(self) -> WorkerInfo | None:
        """Lets a loaded worker measure its device and register; what it said then, once it has.

        Raises:
            TwinpoolError: as ``progress``; ConfigError: the scheduler refuses it.
        """
        if self._joining is None:
            self._joining = self._actor.join.remote()
        return _result(self._joining) if _is_answered(self._joining) else None

    def has_ended(self) -> bool:
        """Whether the process is gone, or has stopped as it was told to."""
        return _is_answered(self._running)

    def has_room(self) -> bool:
        """Whether Ray has found room for it."""
        return bool(placement_group_table(self._group).get("state") == "CREATED")

    def stop(self) -> None:
        """Tells a worker to end what is running; returns at once."""
        self._actor.stop.remote()

    def close(self) -> None:
        """Ends the process if it has not ended, and gives its room back."""
        ray.kill(self._actor)
        remove_placement_group(self._group)


def _place_of(rank: int, group: PlacementGroup, options: WorkerOptions) -> dict[str, Any]:
    """What Ray is told of where a rank's process runs: with its worker's other ranks, on a GPU of its own if on any."""
    return {
        "num_cpus": 0,
        "num_gpus": int(options.device == "cuda"),  # the only one that the process sees
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, rank),
    }


def _is_answered(reference: ray.ObjectRef[Any]) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])


def _result(reference: ray.ObjectRef[Any]) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, TwinpoolError):
            raise error.cause from None
        raise UnavailableError(f"it failed: {error}") from error
    except RayError as error:
        raise UnavailableError(f"its process has ended ({type(error).__name__})") from error
