"""Groups of ranks without Ray: they compute what one rank computes, hand KV over between any degrees, and end whole."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
import torch

from kvcache.errors import ModelError, ResourceError
from kvcache.transfer.port_choice import PortName
from scheduler.types import WorkerRole
from tests.builders import make_shape
from tests.cluster import MAX_MODEL_LEN, ROOMY, TinyCheckpoint, local_cluster
from tests.integration.ports import Came
from tests.ranks import ProcessRanks, ThreadRanks, load_one_at_a_time
from workers.model import runner
from workers.model.attention_layers import own_logits
from workers.model.fused_decoder import FusedDecoder
from workers.model.runner import load_step_model, relative_differences
from workers.model.step_model import StepModel
from workers.model.transformers_model import TransformersModel, load_model
from workers.parallel.leader import GroupModel, LeaderGroup
from workers.parallel.rank import RankLostError
from workers.worker import build_worker
from workers.worker_options import WorkerOptions

pytestmark = pytest.mark.integration


def options_of(checkpoint: TinyCheckpoint, size: int) -> WorkerOptions:
    return WorkerOptions(
        worker_id="worker",
        role=WorkerRole.COLOCATED,
        model_path=str(checkpoint.path),
        model_name="tiny",
        spec=checkpoint.spec,
        shape=make_shape(checkpoint.spec),
        num_blocks=64,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=checkpoint.vocab_size,
        dtype="float32",
        limits=ROOMY,
        tensor_parallel_size=size,
    )


@contextmanager
def running_group(options: WorkerOptions, ranks: ThreadRanks | ProcessRanks) -> Iterator[tuple[LeaderGroup, StepModel]]:
    """A group and its leader's own model."""
    group = LeaderGroup(options, ranks.start, timeout_s=30)
    try:
        model = load_step_model(options, group.rank)
        group.await_ready()
        yield group, model
    finally:
        group.close()
        ranks.join()


@pytest.mark.parametrize("level", ["native", "transformers"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_group_gives_the_logits_of_one_rank(
    checkpoint: TinyCheckpoint, size: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, chunks, decoding and all of them mixed; four ranks hold each of the two KV heads twice."""
    load_one_at_a_time(monkeypatch)
    if level == "transformers":
        monkeypatch.setattr(runner, "find_misfit", lambda *_: "the test says so")
    options = options_of(checkpoint, size)
    model = load_model(checkpoint.path, "float32")
    expected = own_logits(model, runner.compared_tokens(checkpoint.vocab_size))
    with running_group(options, ThreadRanks(options)) as (group, model):
        assert isinstance(model, FusedDecoder if level == "native" else TransformersModel)
        whole = GroupModel(group, model)
        assert max(relative_differences(expected, whole, checkpoint.spec, checkpoint.vocab_size)) < 1e-5


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


def test_a_killed_follower_ends_the_step_and_the_group(checkpoint: TinyCheckpoint) -> None:
    """The reasons to wait are a sum in the shared memory and an answer on the socket: neither may hang."""
    options = options_of(checkpoint, 2)
    ranks = ProcessRanks(options)
    lost: list[str] = []
    with running_group(options, ranks) as (group, model):
        group.watch(lost.append)
        whole = GroupModel(group, model)
        plan = runner._comparison_plans(checkpoint.spec.block_size, runner.compared_tokens(checkpoint.vocab_size))[0]
        whole.logits(plan, group.shards[0])
        follower = ranks.processes[0]
        psutil.Process(follower.pid).suspend()  # so that the step surely waits for it
        killer = threading.Timer(0.5, follower.kill)
        killer.start()
        started = time.monotonic()
        with pytest.raises(RankLostError):
            whole.logits(plan, group.shards[0])
        assert time.monotonic() - started < 20, "the wait ended by its timeout and not by the loss"
        assert len(lost) == 1


def test_followers_end_when_their_leader_is_gone(checkpoint: TinyCheckpoint) -> None:
    options = options_of(checkpoint, 2)
    ranks = ProcessRanks(options)
    with running_group(options, ranks):
        shared = {name for name in os.listdir("/dev/shm") if "twinpool" in name}
        assert not shared, "shared memory with a name outlives a killed process"
    assert [process.returncode for process in ranks.processes] == [0]


def test_what_a_follower_cannot_load_is_said_by_the_leader(
    checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_one_at_a_time(monkeypatch)
    load = runner.load_model

    def load_or_fail(*arguments: object, rank: object = None, **options: object) -> torch.nn.Module:
        if rank is not None and rank.shard.rank == 1:  # type: ignore[attr-defined]
            raise ModelError("a file of it is damaged")
        return load(*arguments, rank=rank, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "load_model", load_or_fail)
    options = options_of(checkpoint, 2)
    ranks = ThreadRanks(options)
    with pytest.raises(ResourceError, match="Rank 1 of 2 could not start: a file of it is damaged"):
        build_worker(options, ranks.start)
    ranks.join()
