"""Workers that cannot exchange KV (F17): refused at registration by the name of the field, never paired, no crash."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig

from scheduler.batching import BatchLimits
from scheduler.controller import RefuseWorker, WorkerRegistered
from scheduler.types import WorkerRole
from tests.cluster import DEVICE, TinyCheckpoint, local_cluster, tiny_llama, worker_options
from tests.leaks import check_no_leaks
from workers.worker import build_worker

pytestmark = pytest.mark.integration


def changed(**fields: Any) -> Any:
    def make_config(vocab_size: int) -> PreTrainedConfig:
        values = tiny_llama(vocab_size).to_dict() | fields
        return LlamaConfig(**{"vocab_size": vocab_size, **values})

    return make_config


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_hidden_layers": 2}, "num_layers"),
        ({"num_key_value_heads": 4}, "num_kv_heads"),
        ({"head_dim": 32}, "head_size"),
        ({"vocab_size": 400}, "vocab_size"),
        ({"rms_norm_eps": 1e-4}, "checkpoint"),
    ],
    ids=["layers", "KV heads", "head size", "vocabulary", "another model of the same shape"],
)
def test_a_real_worker_of_another_shape_is_refused_by_the_name_of_the_field(
    checkpoint: TinyCheckpoint, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    other = TinyCheckpoint(tmp_path, changed(**fields))
    limits = BatchLimits(max_num_seqs=4)

    options = worker_options(other, "a-prefill", WorkerRole.PREFILL, 64, limits, 30.0)
    options = replace(options, vocab_size=fields.get("vocab_size", other.vocab_size))

    async def scenario() -> None:
        stranger = build_worker(options)
        await stranger.start()
        async with local_cluster(checkpoint, prefill=1, decode=1) as cluster:
            ((command,),) = await cluster.scheduler.handle([WorkerRegistered(stranger.info(1, DEVICE))])
            assert isinstance(command, RefuseWorker)
            assert (command.worker_id, command.is_final) == ("a-prefill", True)
            assert named in command.message
            for seed in range(3):
                await cluster.check_greedy(checkpoint.prompt(40, seed=seed), 5)
            prefills = {placed.prefill.worker_id for placed in cluster.scheduler.placements if placed.prefill}
            assert prefills == {"prefill-0"}
        await check_no_leaks([stranger])
        await stranger.stop()

    asyncio.run(scenario())
