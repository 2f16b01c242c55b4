"""Groups of ranks without Ray: they compute what one rank computes, hand KV over between any degrees, and end whole.

"GPUs" are stood in for: gloo for NCCL, and the CPU's memory for theirs. All else is the code that runs on GPUs.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import psutil
import pytest
import torch

from kvcache.errors import ModelError, ResourceError
from kvcache.heads import Shard
from kvcache.storage import PagedStorage
from kvcache.transfer.port_choice import PortName
from scheduler.request import SamplingParams
from scheduler.step_plan import StepPlan
from scheduler.types import WorkerRole
from tests.builders import make_scheduled
from tests.cluster import TinyCheckpoint, local_cluster
from tests.integration.ports import Came
from tests.rank_groups import options_of, running_group
from tests.ranks import ProcessRanks, ThreadRanks, load_one_at_a_time, stand_in_for_gpus
from workers.device import Device
from workers.model import cuda_model, runner
from workers.model.attention_layers import own_logits
from workers.model.comparison import compared_tokens, comparison_plans, relative_differences
from workers.model.fused_decoder import FusedDecoder
from workers.model.runner import load_step_model
from workers.model.step_model import StepModel
from workers.model.transformers_model import TransformersModel, load_model
from workers.native.library import load_library
from workers.parallel import follower
from workers.parallel.leader import LeaderGroup
from workers.parallel.rank import Rank, RankLostError, join_store, open_store, reduce_bytes
from workers.worker import build_worker

pytestmark = pytest.mark.integration
DEVICES: list[Device] = ["cpu", "cuda"]
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_gpus(monkeypatch.setattr)


@pytest.mark.parametrize("level", ["native", "transformers", "GPUs"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_group_gives_the_logits_of_one_rank(
    checkpoint: TinyCheckpoint, size: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, chunks, decoding and all of them mixed; four ranks hold each of the two KV heads twice."""
    load_one_at_a_time(monkeypatch)
    if level == "transformers":
        monkeypatch.setattr(runner, "find_misfit", lambda *_: "the test says so")
    options = options_of(checkpoint, size, "cuda" if level == "GPUs" else "cpu")
    expected = own_logits(load_model(checkpoint.path, "float32"), compared_tokens(checkpoint.vocab_size))
    with running_group(options, ThreadRanks(options)) as (group, whole):
        assert isinstance(whole.own, FusedDecoder if level == "native" else TransformersModel)
        assert group.rank.is_on_gpu == (level == "GPUs")
        differences = relative_differences(expected, whole, checkpoint.spec, checkpoint.vocab_size)
        assert max(map(max, differences.values())) < 1e-5


@pytest.mark.skipif(load_library() is None, reason="no native build for this processor")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", "none"), ("float32", "int8"), ("float32", "int4"), ("bfloat16", "int4")]
)
def test_rounded_weights_are_served_whatever_the_number_of_ranks(
    checkpoint: TinyCheckpoint, size: int, dtype: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What of the logits rounding costs, over all kinds of rows, is that of one rank to a quarter."""
    load_one_at_a_time(monkeypatch)
    expected = own_logits(load_model(checkpoint.path, "float32"), compared_tokens(checkpoint.vocab_size))

    def cost(num_ranks: int) -> float:
        options = replace(options_of(checkpoint, num_ranks), dtype=dtype, quantization=quantization)
        if num_ranks == 1:
            return mean_difference(load_step_model(options))
        with running_group(options, ThreadRanks(options)) as (_, whole):
            assert isinstance(whole.own, FusedDecoder)
            return mean_difference(whole)

    def mean_difference(step_model: StepModel) -> float:
        differences = relative_differences(expected, step_model, checkpoint.spec, checkpoint.vocab_size)
        return statistics.fmean(chain.from_iterable(differences.values()))

    assert cost(size) == pytest.approx(cost(1), rel=0.25)


@pytest.mark.parametrize(
    ("prefill", "decode", "port"),
    [(2, 1, "grpc"), (1, 2, "shm"), (2, 4, "grpc"), (1, 4, "grpc"), (4, 1, "shm"), (4, 2, "grpc")],
)
def test_the_pools_may_have_different_degrees(
    checkpoint: TinyCheckpoint, prefill: int, decode: int, port: PortName, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_one_at_a_time(monkeypatch)
    came = Came(monkeypatch)
    sizes = {WorkerRole.PREFILL: prefill, WorkerRole.DECODE: decode}

    async def scenario() -> None:
        async with local_cluster(
            checkpoint, prefill=1, decode=1, tensor_parallel_sizes=sizes, kv_transfer_port=port
        ) as cluster:
            prompts = [checkpoint.prompt(length, seed=length) for length in (1, 16, 33, 100)]
            await asyncio.gather(*(cluster.check_greedy(prompt, 12) for prompt in prompts))
            assert cluster.load("decode-0").transfers == len(prompts)
            assert cluster.load("decode-0").prompt_tokens_computed == 0
        came.check_only(port)

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [2, 4])
def test_kv_on_gpus_is_read_and_written_as_that_of_one_rank(
    checkpoint: TinyCheckpoint, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's first chunk, whose logits nobody wants; its blocks to other places; then the rest of it from there."""
    load_one_at_a_time(monkeypatch)
    options = options_of(checkpoint, size, "cuda")
    alone = TransformersModel(load_model(checkpoint.path, "float32"))
    prompt = checkpoint.prompt(41)
    first = StepPlan((make_scheduled("prompt", prompt[:40], 0, [7, 3, 9], None),))
    rest = StepPlan((make_scheduled("prompt", prompt[40:], 40, [1, 4, 2], GREEDY),))
    storage = PagedStorage(options.spec, options.given_num_blocks)
    with running_group(options, ThreadRanks(options)) as (group, whole):
        alone.logits(first, storage)
        assert whole.logits(first, group.own_storage).shape == (0, checkpoint.vocab_size)
        for layer in range(options.spec.num_layers):
            found = bytes(group.storage.read_blocks(layer, [7, 3, 9]))
            expected = bytes(storage.read_blocks(layer, [7, 3, 9]))
            torch.testing.assert_close(as_floats(found), as_floats(expected), rtol=1e-4, atol=1e-4)
            for kept in (group.storage, storage):
                kept.write_blocks(layer, [1, 4, 2], expected)
                kept.write_blocks(layer, [7, 3, 9], bytes(len(expected)))
        torch.testing.assert_close(
            whole.logits(rest, group.own_storage), alone.logits(rest, storage), rtol=1e-4, atol=1e-4
        )


def as_floats(payload: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_follower_ends_the_step_and_the_group(checkpoint: TinyCheckpoint, device: Device) -> None:
    """The reasons to wait are a sum, in the shared memory or of torch, and an answer on the socket: none may hang."""
    options = options_of(checkpoint, 2, device)
    ranks = ProcessRanks(options, without_gpu=True)
    lost: list[str] = []
    with running_group(options, ranks) as (group, whole):
        group.watch(lost.append)
        plan = comparison_plans(checkpoint.spec.block_size, compared_tokens(checkpoint.vocab_size))[0]
        whole.logits(plan, group.own_storage)
        follower = ranks.processes[0]
        psutil.Process(follower.pid).suspend()  # so that the step surely waits for it
        killer = threading.Timer(0.5, follower.kill)
        killer.start()
        started = time.monotonic()
        with pytest.raises(RankLostError):
            whole.logits(plan, group.own_storage)
        assert time.monotonic() - started < 20, "the wait ended by its timeout and not by the loss"
        assert len(lost) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_followers_end_when_their_leader_is_gone(checkpoint: TinyCheckpoint, device: Device) -> None:
    options = options_of(checkpoint, 2, device)
    ranks = ProcessRanks(options, without_gpu=True)
    with running_group(options, ranks):
        shared = {name for name in os.listdir("/dev/shm") if "twinpool" in name}
        assert not shared, "shared memory with a name outlives a killed process"
    assert [process.returncode for process in ranks.processes] == [0]


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_follower_cannot_load_is_said_by_the_leader(
    checkpoint: TinyCheckpoint, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_one_at_a_time(monkeypatch)
    load = runner.load_model

    def load_or_fail(*arguments: object, rank: object = None, **options: object) -> torch.nn.Module:
        if rank is not None and rank.shard.rank == 1:  # type: ignore[attr-defined]
            raise ModelError("a file of it is damaged")
        return load(*arguments, rank=rank, **options)  # type: ignore[arg-type]

    for module in (runner, cuda_model):
        monkeypatch.setattr(module, "load_model", load_or_fail)
    options = options_of(checkpoint, 2, device)
    ranks = ThreadRanks(options)
    with pytest.raises(ResourceError, match="Rank 1 of 2 could not start: a file of it is damaged"):
        build_worker(options, ranks.start)
    ranks.join()


def test_gpus_that_a_group_does_not_see_are_refused_by_the_rank(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gpu_of_rank(rank: int) -> str:
        raise ResourceError(f"Rank {rank} needs a GPU.")

    monkeypatch.setattr(follower, "gpu_of_rank", gpu_of_rank)
    options = options_of(checkpoint, 2, "cuda")
    ranks = ThreadRanks(options)
    with pytest.raises(ResourceError, match="Rank 1"):
        LeaderGroup(options, ranks.start, timeout_s=2)
    ranks.join()


@pytest.mark.parametrize("vocab_size", [4, 7])
def test_gathered_logits_lie_in_the_order_of_the_vocabulary(vocab_size: int) -> None:
    """Shares that differ by a token too, which gloo by itself does not take."""
    size, (store, port) = 3, open_store(3)
    memory = torch.zeros(reduce_bytes(size), dtype=torch.uint8)
    logits = torch.arange(2 * vocab_size, dtype=torch.float32).view(2, vocab_size)

    def gather(number: int) -> torch.Tensor:
        own_store = store if number == 0 else join_store(port, size)
        shard = Shard(number, size)
        rank = Rank(shard, own_store, memory, 20, gpu="cpu")
        tokens = shard.of(vocab_size)
        return rank.gather_logits(logits[:, tokens.start : tokens.stop], vocab_size)

    with ThreadPoolExecutor(size) as threads:
        for gathered in threads.map(gather, range(size)):
            assert torch.equal(gathered, logits)
