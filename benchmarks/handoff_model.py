"""What is left to see of the handoff of a large model: TTFT with it over TTFT without, from measured parts.

Prefill times: Llama2-70B on 8 H100 (tensor parallelism 8, batch 1), medians of the public measurements of splitwise-sim
(Mutinifni/splitwise-sim, MIT). Llama-3.1-70B has the same 80 layers of the same width and nearly the same arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.spec import KVCacheSpec
from kvcache.transfer.wire import MAX_CHUNK_BYTES

LLAMA_70B = KVCacheSpec(num_layers=80, num_kv_heads=8, head_size=128, block_size=16, dtype="bfloat16")
PREFILL_S = {256: 0.0517, 512: 0.0539, 1024: 0.0779, 2048: 0.1368, 4096: 0.3903, 8192: 0.8449}
LINKS_GBIT_S = (25, 100, 400)


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """A side's own work, measured here, in seconds."""

    per_chunk_s: float  # of a full one
    message_s: float  # of a message of nearly nothing, as the commit is


def visible_ratio(num_tokens: int, prefill_s: float, link_gbit_s: float, cost: ChunkCost) -> float:
    """TTFT with the handoff over TTFT without.

    Layers are computed one after the other, in equal times, and each leaves as soon as it is there. A layer takes as
    long as the slower of the link and a side's own work on its chunks. The last one cannot be hidden::

        compute   │ layer 0 │ layer 1 │ … │ layer 79 │
        handoff             │ layer 0 │ … │ layer 78 │ layer 79 │ commit
    """
    layer_bytes = LLAMA_70B.handoff_bytes(num_tokens) / LLAMA_70B.num_layers
    chunks = -(-layer_bytes // MAX_CHUNK_BYTES)
    layer_s = max(8 * layer_bytes / (link_gbit_s * 1e9), chunks * cost.per_chunk_s)
    computed_s = prefill_s / LLAMA_70B.num_layers
    done_s = 0.0
    for layer in range(LLAMA_70B.num_layers):
        done_s = max(done_s, (layer + 1) * computed_s) + layer_s
    return (done_s + cost.message_s) / prefill_s


def model_70b(cost: ChunkCost) -> dict[str, dict[str, float]]:
    """By link in Gb/s, then by prompt length."""
    return {
        str(link): {
            str(tokens): visible_ratio(tokens, prefill_s, link, cost) for tokens, prefill_s in PREFILL_S.items()
        }
        for link in LINKS_GBIT_S
    }
