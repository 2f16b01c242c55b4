"""Tensor-parallel groups without Ray: followers as threads of the test, or as processes that it may kill."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from pydantic import TypeAdapter

from kvcache.errors import TwinpoolError
from workers.model import runner
from workers.parallel.follower import run_follower
from workers.worker_options import WorkerOptions

OPTIONS = TypeAdapter(WorkerOptions)


class ThreadRanks:
    """Followers in threads of this process, for all but what a process of its own must show."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._threads: list[threading.Thread] = []

    def start(self, address: str) -> Callable[[], bool]:
        """A ``StartFollowers``."""
        self._threads = [
            threading.Thread(target=self._run, args=(rank, address), daemon=True)
            for rank in range(1, self._options.tensor_parallel_size)
        ]
        for thread in self._threads:
            thread.start()
        return lambda: not all(thread.is_alive() for thread in self._threads)

    def _run(self, rank: int, address: str) -> None:
        with contextlib.suppress(TwinpoolError):  # the leader hears of it, and its test
            run_follower(self._options, rank, address)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(timeout=10)
        assert not any(thread.is_alive() for thread in self._threads), "a follower went on after its leader had ended"


class ProcessRanks:
    """Followers in processes, as in a real cluster."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, address: str) -> Callable[[], bool]:
        """A ``StartFollowers``."""
        arguments = [sys.executable, "-m", "tests.ranks", OPTIONS.dump_json(self._options).decode(), address]
        self.processes = [
            subprocess.Popen([*arguments, str(rank)]) for rank in range(1, self._options.tensor_parallel_size)
        ]
        return lambda: any(process.poll() is not None for process in self.processes)

    def join(self) -> None:
        for process in self.processes:
            process.wait(timeout=20)


def load_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers sets things of the whole process while it loads, which threads must not do at once."""
    lock = threading.Lock()
    load_model = runner.load_model

    def locked(*args: object, **kwargs: object) -> object:
        with lock:
            return load_model(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "load_model", locked)


if __name__ == "__main__":
    run_follower(OPTIONS.validate_json(sys.argv[1]), int(sys.argv[3]), sys.argv[2])
