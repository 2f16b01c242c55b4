"""Tensor parallelism over NCCL: every rank in a process of its own, on a GPU of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.cluster import TinyCheckpoint
from tests.e2e.client import complete_all, expected
from tests.e2e.reference import ReferenceCase
from tests.e2e.server import serving
from tests.rank_groups import options_of, running_group
from tests.ranks import ProcessRanks
from workers.model.attention_layers import own_logits
from workers.model.comparison import compared_tokens, comparison_plans, relative_differences
from workers.model.transformers_model import load_model
from workers.parallel.leader import GroupModel, LeaderGroup
from workers.parallel.rank import RankLostError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCheckpoint:
    return TinyCheckpoint(tmp_path)


@pytest.fixture
def group_of_two(tiny: TinyCheckpoint) -> Iterator[tuple[LeaderGroup, GroupModel, ProcessRanks]]:
    options = replace(options_of(tiny, 2, "cuda"), num_blocks=None, gpu_memory_utilization=0.5)
    ranks = ProcessRanks(options)
    with running_group(options, ranks) as (group, whole):
        yield group, whole, ranks


def test_two_gpus_give_the_logits_of_one_model(
    tiny: TinyCheckpoint, group_of_two: tuple[LeaderGroup, GroupModel, ProcessRanks]
) -> None:
    group, whole, _ = group_of_two
    expected_logits = own_logits(load_model(tiny.path, "float32"), compared_tokens(tiny.vocab_size)).cuda()
    assert max(map(max, relative_differences(expected_logits, whole, tiny.spec, tiny.vocab_size).values())) < 1e-4
    assert group.rank.device == "cuda:0"


def test_kv_of_both_gpus_makes_a_round_trip(group_of_two: tuple[LeaderGroup, GroupModel, ProcessRanks]) -> None:
    storage = group_of_two[0].storage
    payload = torch.randint(256, (3 * storage.spec.layer_block_bytes,), dtype=torch.uint8).numpy().tobytes()
    storage.write_blocks(1, [4, 0, 2], payload)
    assert bytes(storage.read_blocks(1, [4, 0, 2])) == payload
    assert not any(storage.read_blocks(1, [1, 3])) and not any(storage.read_blocks(0, [4, 0, 2]))


def test_a_killed_follower_ends_the_step(
    tiny: TinyCheckpoint, group_of_two: tuple[LeaderGroup, GroupModel, ProcessRanks]
) -> None:
    """The leader waits for its own GPU then, which waits for the other one."""
    group, whole, ranks = group_of_two
    plan = comparison_plans(tiny.spec.block_size, compared_tokens(tiny.vocab_size))[0]
    follower = ranks.processes[0]
    psutil.Process(follower.pid).suspend()
    threading.Timer(1.0, follower.kill).start()
    started = time.monotonic()
    with pytest.raises(RankLostError):
        whole.logits(plan, group.own_storage)
    assert time.monotonic() - started < 20, "the wait ended by its timeout and not by the loss"


@pytest.mark.e2e
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA GPUs")
def test_prefill_on_one_gpu_and_decode_on_three(reference: list[ReferenceCase]) -> None:
    flags = ("--device", "cuda", "--dtype", "float32", "--decode-tensor-parallel-size", "3")
    with serving(*flags, expected_workers=2) as server:
        assert asyncio.run(complete_all(server.url, reference, at_once=16)) == expected(reference)
