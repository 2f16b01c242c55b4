"""Speed of the KV handoff: ``python -m benchmarks.handoff [--json FILE]``.

Real senders and receivers in two processes, beside what this machine can move at the same moment: bare gRPC, raw TCP
and memcpy. All take turns, so that a slow minute of the machine meets each of them; figures are medians.

Exit status: 0, 1 when it cannot run, 2 for a wrong flag, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.command_line import Parser, exit_status, write_json
from benchmarks.handoff_links import (
    MESSAGE_BYTES,
    Peer,
    bare_grpc_async_gb_s,
    bare_grpc_gb_s,
    memcpy_gb_s,
    running_peer,
    tcp_gb_s,
)
from benchmarks.handoff_model import ChunkCost, model_70b
from benchmarks.handoff_transfers import BufferMemory, Sender, Together
from benchmarks.handoff_ttft import TwoAndOne
from benchmarks.machine import describe_run
from kvcache.spec import KVCacheSpec
from kvcache.transfer.allocator import keep_message_buffers
from kvcache.transfer.grpc_port import GrpcPort
from kvcache.transfer.port import KVPort
from kvcache.transfer.shm_port import ShmPort
from kvcache.transfer.wire import MAX_CHUNK_BYTES
from workers.channels import ChannelPool
from workers.model.checkpoint import DEFAULT_MODEL, describe_checkpoint, prepare_checkpoint

BLOCK_SIZE = 16
PROMPTS = (256, 1024, 4096)
LONG_TOKENS = 4096  # of the one handoff whose rate is told
TOGETHER = 64
SHORT_TOKENS = 256  # of each of those
HELD = 16  # handoffs whose receiver stops reading
FULL_TOKENS = 1024  # of each of those: its chunks are full
TINY_TOKENS = 16  # one block: what a handoff costs beside its bytes


@dataclass(frozen=True, slots=True)
class Options:
    runs: int
    ttft_runs: int
    json_path: Path | None


@dataclass(frozen=True, slots=True)
class Concurrent:
    transfers: int
    gb_s: float
    of_one: float  # of the rate of one handoff alone, over gRPC
    slowest_over_mean: float
    shm_of_one: float
    shm_slowest_over_mean: float


@dataclass(frozen=True, slots=True)
class Result:
    """The fields are the keys of the JSON object."""

    date: str
    grpc_gb_s: float
    grpc_bare_gb_s: float
    grpc_of_bare: float
    tcp_gb_s: float
    shm_gb_s: float
    memcpy_gb_s: float
    shm_of_memcpy: float
    ttft_ratio: dict[str, float]
    concurrent: Concurrent
    memory: dict[str, BufferMemory]  # by port
    grpc_bare_by_message: dict[str, float]  # by API and message size in KiB
    chunk_cost: ChunkCost
    llama_70b_ttft_ratio: dict[str, dict[str, float]]  # by link in Gb/s and prompt length; modelled
    runs: int
    machine: dict[str, str | int]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Peers:
    blocking: Peer
    asynchronous: Peer
    tcp: Peer


class Rates:
    """One entry per round in every list."""

    def __init__(self) -> None:
        self.gb_s: dict[str, list[float]] = defaultdict(list)
        self.bare: dict[str, list[float]] = defaultdict(list)
        self.together: dict[str, list[Together]] = defaultdict(list)
        self.message_s: list[float] = []  # of a handoff that is nearly all messages

    def median(self, name: str) -> float:
        return median(self.gb_s[name])


async def measure_round(rates: Rates, peers: Peers, sender: Sender, ports: dict[str, KVPort]) -> None:
    """Everything once, in turns."""
    rates.gb_s["memcpy"].append(memcpy_gb_s())
    rates.gb_s["tcp"].append(tcp_gb_s(peers.tcp))
    for message_bytes in MESSAGE_BYTES:
        size = f"{message_bytes >> 10}"
        blocking = await asyncio.to_thread(bare_grpc_gb_s, peers.blocking, message_bytes)
        rates.bare[f"blocking {size}"].append(blocking)
        rates.bare[f"asyncio {size}"].append(await bare_grpc_async_gb_s(peers.asynchronous, message_bytes))
    for name, port in ports.items():
        rates.gb_s[name].append(await sender.send_one(port, LONG_TOKENS))
        rates.together[name].append(await sender.send_together(port, TOGETHER, SHORT_TOKENS))
    tiny = await sender.send_one(ports["grpc"], TINY_TOKENS)
    num_messages = sender.spec.num_layers + 2  # a chunk per layer, the opening, the commit
    rates.message_s.append(sender.spec.handoff_bytes(TINY_TOKENS) / tiny / 1e9 / num_messages)


async def measure_transfers(
    spec: KVCacheSpec, runs: int, peers: Peers, peer: Peer
) -> tuple[Rates, dict[str, BufferMemory]]:
    num_blocks = TOGETHER * spec.num_blocks_for(SHORT_TOKENS)
    sender = Sender(spec, num_blocks, peer)
    channels = ChannelPool()
    ports: dict[str, KVPort] = {"grpc": GrpcPort(lambda address: channels(address).channel), "shm": ShmPort()}
    rates = Rates()
    for port in ports.values():
        await sender.send_one(port, SHORT_TOKENS)
    for _ in tqdm(range(runs), desc="handoffs", leave=False, disable=None):
        await measure_round(rates, peers, sender, ports)
    memory = {name: await sender.measure_memory(port, HELD, FULL_TOKENS) for name, port in ports.items()}
    await channels.close()
    return rates, memory


def measure(options: Options) -> Result:
    """Raises a StartupError when a process cannot be started."""
    keep_message_buffers()
    torch.set_num_threads(1)
    folder = prepare_checkpoint(DEFAULT_MODEL)
    known = describe_checkpoint(folder, dtype="float32", device="cpu")
    spec = KVCacheSpec(known.num_layers, known.num_kv_heads, known.head_size, BLOCK_SIZE, known.dtype)
    shape = (spec.num_layers, spec.num_kv_heads, spec.head_size, spec.block_size, spec.dtype)
    with ExitStack() as stack:
        peers = Peers(*(stack.enter_context(running_peer(kind)) for kind in ("grpc-sync", "grpc-async", "tcp")))
        num_blocks = TOGETHER * spec.num_blocks_for(SHORT_TOKENS)
        peer = stack.enter_context(running_peer("cache", *map(str, (*shape, num_blocks))))
        rates, memory = asyncio.run(measure_transfers(spec, options.runs, peers, peer))
    with ExitStack() as stack:
        workers = TwoAndOne(folder, known.vocab_size, max(PROMPTS), stack)
        workers.warm_up()
        ttft_ratio = {str(tokens): workers.ratio(tokens, options.ttft_runs) for tokens in PROMPTS}
    return build_result(options, rates, memory, ttft_ratio)


def build_result(
    options: Options, rates: Rates, memory: dict[str, BufferMemory], ttft_ratio: dict[str, float]
) -> Result:
    bare = {name: median(seen) for name, seen in rates.bare.items()}
    best_bare = max(bare.values())
    # The whole pipeline's time per chunk on this machine: a bound on what either side's own work takes of it.
    cost = ChunkCost(MAX_CHUNK_BYTES / rates.median("shm") / 1e9, median(rates.message_s))
    together = rates.together
    return Result(
        grpc_gb_s=rates.median("grpc"),
        grpc_bare_gb_s=best_bare,
        grpc_of_bare=rates.median("grpc") / best_bare,
        tcp_gb_s=rates.median("tcp"),
        shm_gb_s=rates.median("shm"),
        memcpy_gb_s=rates.median("memcpy"),
        shm_of_memcpy=rates.median("shm") / rates.median("memcpy"),
        ttft_ratio=ttft_ratio,
        concurrent=Concurrent(
            TOGETHER,
            median(each.gb_s for each in together["grpc"]),
            median(each.gb_s for each in together["grpc"]) / rates.median("grpc"),
            median(each.slowest_over_mean for each in together["grpc"]),
            median(each.gb_s for each in together["shm"]) / rates.median("shm"),
            median(each.slowest_over_mean for each in together["shm"]),
        ),
        memory=memory,
        grpc_bare_by_message=bare,
        chunk_cost=cost,
        llama_70b_ttft_ratio=model_70b(cost),
        runs=options.runs,
        **describe_run("grpcio", "numpy", "torch", "xxhash"),
    )


def result_table(result: Result) -> Table:
    table = Table("", "", "goal", title=f"KV handoff, medians of {result.runs}")
    together = result.concurrent
    rows = [
        ("gRPC handoff", f"{result.grpc_gb_s:.2f} GB/s, {result.grpc_of_bare:.2f} of bare gRPC", "≥ 0.7"),
        ("bare gRPC, best size", f"{result.grpc_bare_gb_s:.2f} GB/s", ""),
        ("raw TCP", f"{result.tcp_gb_s:.2f} GB/s", ""),
        ("shared memory handoff", f"{result.shm_gb_s:.2f} GB/s, {result.shm_of_memcpy:.2f} of memcpy", "≥ 0.5"),
        ("memcpy", f"{result.memcpy_gb_s:.2f} GB/s", ""),
        (f"{together.transfers} at once", f"{together.of_one:.2f} of one's rate", "≥ 0.9"),
        ("their slowest", f"{together.slowest_over_mean:.2f} of the mean", "≤ 2"),
    ]
    rows += [
        (f"TTFT, {tokens} tokens", f"{ratio:.3f} of one worker's", "≤ 1.05")
        for tokens, ratio in result.ttft_ratio.items()
    ]
    rows += [
        (f"buffers, {port}", f"{seen.sender_chunks:.1f} + {seen.receiver_chunks:.1f} chunks", "≤ 2 on each side")
        for port, seen in result.memory.items()
    ]
    for row in rows:
        table.add_row(*row)
    return table


def parse_options(arguments: Sequence[str]) -> Options:
    """Raises ConfigError, one sentence, for a wrong flag."""
    parser = Parser(prog="python -m benchmarks.handoff", description="Speed of the KV handoff between two processes.")
    parser.add_argument("--runs", type=_count, default=7, metavar="N", help="rounds of handoffs (%(default)s)")
    parser.add_argument("--ttft-runs", type=_count, default=5, metavar="N", help="prompts of each length (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    flags = parser.parse_args(arguments)
    return Options(flags.runs, flags.ttft_runs, flags.json)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    result = measure(options)
    Console().print(result_table(result))
    write_json(options.json_path, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
