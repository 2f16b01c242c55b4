"""A worker in a process of its own, for faults that need one: kill -9, or a stop and a late return.

It sends every block of every layer by itself, so that a test can choose how far a handoff is. It may pause there, as a
whole, until the test has it go on.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, ClassVar

from kvcache.lease import BlockLease
from kvcache.storage import BlockStorage
from kvcache.transfer.sender import OutgoingTransfer, TransferTarget
from kvcache.transfer.wire import Message
from scheduler.events import WorkerLeft, WorkerRegistered
from scheduler.types import WorkerInfo, WorkerLoad, WorkerRole
from tests.cluster import DEVICE, ROOMY, LocalCluster, worker_options
from tests.leaks import check_no_leaks, until
from workers import prefill
from workers.worker import Worker, build_worker
from workers.worker_options import WorkerOptions

START_TIMEOUT_S = 60.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.worker_process"])  # imports once, then each process is there at once


class WorkerProcess:
    """Handle of a running worker. A test that does not kill it ends with ``check_leaks``."""

    def __init__(self, options: WorkerOptions, pause_after_chunks: int | None = None) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._pausing, their_pausing = _CONTEXT.Pipe()
        given = (options, theirs, their_pausing, pause_after_chunks)
        self._process: ForkServerProcess = _CONTEXT.Process(target=_run, args=given, daemon=True)
        self._process.start()
        theirs.close()
        their_pausing.close()
        if not self._connection.poll(START_TIMEOUT_S):
            raise AssertionError("a worker process did not start")
        self.info: WorkerInfo = self._connection.recv()
        assert self.info.process_id == self._process.pid != os.getpid()

    @property
    def state(self) -> str:
        """As the kernel has it: R, S, T for stopped, and so on."""
        return Path(f"/proc/{self.info.process_id}/stat").read_text().rpartition(")")[2].split()[0]

    def kill(self) -> None:
        """kill -9; returns when the process is gone."""
        os.kill(self.info.process_id, signal.SIGKILL)
        self._process.join(START_TIMEOUT_S)
        assert self._process.exitcode == -signal.SIGKILL

    async def stop(self) -> None:
        """Not a thread of it runs any more when this returns."""
        os.kill(self.info.process_id, signal.SIGSTOP)
        await until(lambda: self.state == "T", "the process to be stopped")

    async def go_on(self) -> None:
        os.kill(self.info.process_id, signal.SIGCONT)
        await until(lambda: self.state != "T", "the process to run")

    async def pauses(self) -> None:
        """Returns when it has sent so many chunks of a handoff and neither sends nor hears anything."""
        await until(self._pausing.poll, "the worker's pause", START_TIMEOUT_S)
        self._pausing.recv()

    def end_pause(self) -> None:
        self._pausing.send("")

    async def check_leaks(self) -> None:
        """Fails when the worker, which has nothing to do now, has leaked anything."""
        assert await self._ask("check") == ""

    async def load(self) -> WorkerLoad:
        """As it would report it now."""
        load = await self._ask("load")
        assert isinstance(load, WorkerLoad)
        return load

    async def _ask(self, question: str) -> object:
        self._connection.send(question)
        await until(self._connection.poll, "the worker's answer", START_TIMEOUT_S)
        answer: object = self._connection.recv()
        return answer

    def close(self) -> None:
        if self._process.is_alive():
            self.kill()
        self._process.close()
        self._connection.close()
        self._pausing.close()


@asynccontextmanager
async def worker_process(
    cluster: LocalCluster,
    worker_id: str,
    role: WorkerRole,
    lease_ttl_s: float = 30.0,
    pause_after_chunks: int | None = None,
    **others: Any,
) -> AsyncIterator[WorkerProcess]:
    """Joins a cluster with one more worker. Equal and idle workers are taken in the order of their ids.

    Args:
        pause_after_chunks: of the first handoff that has more.
        others: further options of the worker.
    """
    options = replace(worker_options(cluster.checkpoint, worker_id, role, 256, ROOMY, lease_ttl_s), **others)
    process = await asyncio.to_thread(WorkerProcess, options, pause_after_chunks)
    try:
        await cluster.scheduler.handle([WorkerRegistered(process.info)])
        yield process
    finally:
        process.close()
        await cluster.scheduler.handle([WorkerLeft(worker_id, process.info.incarnation)])


class _SmallChunks(OutgoingTransfer):
    """Of one block each."""

    pausing: ClassVar[Connection]
    pause_after_chunks: ClassVar[int | None]

    def __init__(self, storage: BlockStorage, lease: BlockLease, target: TransferTarget) -> None:
        super().__init__(storage, lease, target, max_chunk_bytes=1)

    def next_message(self, slot: memoryview | None = None) -> Message | None:
        if self._num_chunks == self.pause_after_chunks:
            type(self).pause_after_chunks = None  # once
            self.pausing.send("")
            self.pausing.recv()  # the event loop stands still
        return super().next_message(slot)


def _run(options: WorkerOptions, connection: Connection, pausing: Connection, pause_after_chunks: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test ends us
    _SmallChunks.pausing, _SmallChunks.pause_after_chunks = pausing, pause_after_chunks
    prefill.OutgoingTransfer = _SmallChunks  # type: ignore[misc, assignment]
    asyncio.run(_serve(options, connection))


async def _serve(options: WorkerOptions, connection: Connection) -> None:
    worker = build_worker(options)
    await worker.start()
    connection.send(worker.info(time.monotonic_ns(), DEVICE))
    while True:  # until it is killed
        question = await asyncio.to_thread(connection.recv)
        connection.send(worker.load() if question == "load" else await _leaks(worker))


async def _leaks(worker: Worker) -> str:
    try:
        await check_no_leaks([worker])
    except Exception as error:  # noqa: BLE001  the process's top: told to the test
        return f"{type(error).__name__}: {error}"
    return ""
