"""How long a fresh process takes until it answers, and how much memory it needs at most.

Run as a program it is that process: it loads the model, answers one short prompt, says so, and then computes one
long prompt, so that its peak holds the activations of full steps too.
"""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine_work import EngineSettings, num_blocks_needed, open_engine
from kvcache.errors import ResourceError, TwinpoolError
from workers.model.checkpoint import describe_checkpoint

READY = "ready"
SHORT_PROMPT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class FreshProcess:
    ready_s: float  # from its start to its first answer
    peak_memory_bytes: int  # resident


def measure_fresh_process(settings: EngineSettings, num_tokens: int) -> FreshProcess:
    """Starts one and waits for its end. ``num_tokens`` is the length of its long prompt.

    Raises:
        ResourceError: it did not get as far; with the last line that it wrote.
    """
    checkpoint = settings.checkpoint
    loaded = (checkpoint.path, checkpoint.dtype, settings.num_threads, settings.step_model, settings.kv_cache_dtype)
    words = (*loaded, num_tokens)
    command = [sys.executable, "-m", "benchmarks.engine_ready", *map(str, words)]
    with tempfile.TemporaryFile("w+") as errors:
        started_s = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            is_ready = process.stdout.readline().strip() == READY
            ready_s = time.perf_counter() - started_s
            peak = process.stdout.read().strip()
        if process.returncode or not is_ready:
            errors.seek(0)
            last_line = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise ResourceError(f"A fresh process ended with status {process.returncode}: {last_line}")
    return FreshProcess(ready_s, int(peak))


async def _answer(settings: EngineSettings, num_tokens: int) -> None:
    num_blocks = num_blocks_needed([num_tokens], batches=[1], contexts=[SHORT_PROMPT_TOKENS])
    async with open_engine(settings, num_blocks, max_seqs=1) as engine:
        await engine.prefill(SHORT_PROMPT_TOKENS)
        print(READY, flush=True)
        await engine.prefill(num_tokens)
    print(peak_memory_bytes())


def peak_memory_bytes() -> int:
    """The most that was resident of this process, in bytes.

    On Linux not from getrusage: a process starts with the ru_maxrss of the one that started it.
    """
    try:
        return high_water_mark(Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def high_water_mark(status: str) -> int:
    """VmHWM of a /proc/<pid>/status, in bytes."""
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main(arguments: Sequence[str]) -> int:
    """Six words, in the order that ``measure_fresh_process`` gives them."""
    folder, dtype, num_threads, step_model, kv_cache_dtype, num_tokens = arguments
    try:
        checkpoint = describe_checkpoint(Path(folder), dtype=dtype, device="cpu")
        settings = EngineSettings(checkpoint, int(num_threads), step_model, kv_cache_dtype)
        asyncio.run(_answer(settings, int(num_tokens)))
    except TwinpoolError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
