"""A real worker process without Ray, for ``benchmarks.handoff``: it prints its address and ends with its input.

``python -m benchmarks.handoff_worker ROLE MODEL_FOLDER NUM_TOKENS``
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from kvcache.spec import KVCacheSpec
from kvcache.transfer.allocator import keep_message_buffers
from scheduler.batching import BatchLimits
from scheduler.types import WorkerRole
from workers.model.checkpoint import describe_checkpoint
from workers.model.shape import model_shape
from workers.worker import build_worker
from workers.worker_options import WorkerOptions

BLOCK_SIZE = 16
NUM_SEQUENCES = 2


def worker_options(role: WorkerRole, folder: Path, num_tokens: int) -> WorkerOptions:
    """What ``twinpool serve`` gives a worker of one thread, but without a prefix cache: every prompt is computed."""
    known = describe_checkpoint(folder, dtype="float32", device="cpu")
    spec = KVCacheSpec(known.num_layers, known.num_kv_heads, known.head_size, BLOCK_SIZE, known.dtype)
    return WorkerOptions(
        worker_id=f"{role.value}-0",
        role=role,
        model_path=str(folder),
        model_name="model",
        spec=spec,
        shape=model_shape(known, spec, "none"),
        num_blocks=NUM_SEQUENCES * spec.num_blocks_for(num_tokens),
        max_model_len=num_tokens,
        vocab_size=known.vocab_size,
        dtype=known.dtype,
        limits=BatchLimits(max_num_seqs=NUM_SEQUENCES, max_num_batched_tokens=512),
        prefix_caching=False,
    )


async def serve(options: WorkerOptions) -> None:
    worker = build_worker(options)
    await worker.start()
    print(worker.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await worker.stop()


if __name__ == "__main__":
    keep_message_buffers()
    asyncio.run(serve(worker_options(WorkerRole(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
