"""Tensor-parallel groups without Ray: followers as threads of the test, or as processes that it may kill.

The way over GPUs can be run without one: gloo stands in for NCCL, and a CPU's memory for a GPU's.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import TypeAdapter

from kvcache.errors import TwinpoolError
from kvcache.heads import Shard
from workers.model import cuda_model, runner
from workers.parallel import follower, leader, rank
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

    def __init__(self, options: WorkerOptions, *, without_gpu: bool = False) -> None:
        """``without_gpu``: of a group on GPUs, which are stood in for, see ``stand_in_for_gpus``."""
        self._options = options
        self._more = ("without-gpu",) if without_gpu else ()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, address: str) -> Callable[[], bool]:
        """A ``StartFollowers``."""
        arguments = [sys.executable, "-m", "tests.ranks", OPTIONS.dump_json(self._options).decode(), address]
        self.processes = [
            subprocess.Popen([*arguments, str(rank), *self._more])
            for rank in range(1, self._options.tensor_parallel_size)
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

    for module in (runner, cuda_model):
        monkeypatch.setattr(module, "load_model", locked)


def stand_in_for_gpus(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """From here on ranks of this process that ask for GPUs get the CPU, and gloo where they ask for NCCL.

    Both take the same calls. ``replace`` may be a monkeypatch's.
    """

    def open_group(store: Any, shard: Shard, timeout_s: float) -> Any:
        return rank.open_gloo(rank.distributed.PrefixStore("instead-of-nccl", store), shard, timeout_s)

    replace(rank, "open_nccl", open_group)
    for module in (leader, follower):
        replace(module, "gpu_of_rank", lambda _rank: "cpu")


if __name__ == "__main__":
    if "without-gpu" in sys.argv[4:]:
        stand_in_for_gpus()
    run_follower(OPTIONS.validate_json(sys.argv[1]), int(sys.argv[3]), sys.argv[2])
