"""A tensor-parallel group as a test wants it: over the tiny checkpoint, with its ranks started and ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from scheduler.types import WorkerRole
from tests.builders import make_shape
from tests.cluster import MAX_MODEL_LEN, ROOMY, TinyCheckpoint
from tests.ranks import ProcessRanks, ThreadRanks
from workers.device import Device
from workers.parallel.leader import GroupModel, LeaderGroup
from workers.worker_options import WorkerOptions


def options_of(checkpoint: TinyCheckpoint, size: int, device: Device = "cpu") -> WorkerOptions:
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
        device=device,
    )


@contextmanager
def running_group(
    options: WorkerOptions, ranks: ThreadRanks | ProcessRanks
) -> Iterator[tuple[LeaderGroup, GroupModel]]:
    """A group and the model that it computes."""
    group = LeaderGroup(options, ranks.start, timeout_s=30)
    try:
        yield group, group.load()
    finally:
        group.close()
        ranks.join()
