"""The nouns of scheduling: who the workers are, what they can do, what was decided.

Everything here is a frozen dataclass with slots: it crosses processes and is compared in tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from kvcache.spec import KVCacheSpec
from scheduler.messages import message


class Phase(StrEnum):
    """The two halves of serving one request."""

    PREFILL = "prefill"  # bound by arithmetic
    DECODE = "decode"  # bound by memory bandwidth


class WorkerRole(StrEnum):
    """Which phases a worker takes."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"

    def takes(self, phase: Phase) -> bool:
        return self is WorkerRole.COLOCATED or self.value == phase.value


@message
@dataclass(frozen=True, slots=True)
class GemmRate:
    """How fast linear layers are when a step has so many rows (tokens): few rows are bound by reading weights."""

    rows: int
    gflop_s: float


@message
@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a device can do, at the dtype the worker computes in: measured, or read from a file.

    Rates are what is reached and not a data sheet's peak. A rate of 0 is unknown: ``CostModel`` then takes another.
    """

    name: str  # for people; no decision reads it
    gemm_gflop_s: float  # large matrix products, 1e9 multiply-adds x 2 per second
    read_gb_s: float  # streaming reads of main memory, 1e9 bytes per second
    memory_bytes: int
    num_threads: int = 1
    price_per_hour: float = 0.0  # 0 means unknown
    gemm_rates: tuple[GemmRate, ...] = ()  # by growing rows, in the weights' format; empty: the roofline of the above
    attention_gb_s: float = 0.0  # KV read by the attention of decoding sequences
    link_gb_s: float = 0.0  # KV payload to another worker
    sources: tuple[tuple[str, str], ...] = ()  # (field, where it is from); what is not named was measured here
    prompt_attention_gflop_s: float = 0.0  # attention of prompts
    layer_s: float = 0.0  # that each layer adds to a step, whatever it computes: kernels begin and end one by one


@message
@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a prediction needs of a model. A multiply-add is 2 FLOP; of a tensor-parallel worker all ranks together.

    Left out, being under 1 %: norms, rotary embedding, activations, embedding rows, KV writes.
    """

    num_layers: int
    weight_bytes: float  # read by every step: the layers, in the format they are computed in
    head_bytes: float  # the output head, read by every step that samples
    linear_flops: float  # of one token in the layers' linear parts
    head_flops: float  # of one row of logits
    attention_flops: float  # of one token with one token of its context, itself among them
    kv_token_bytes: int  # of one token over all layers


@message
@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself when it registers; constant for the life of one process, its role apart."""

    worker_id: str  # given by the launcher, e.g. "prefill-0"; a restarted worker keeps it
    incarnation: int  # grows with every restart: late words of an earlier process are ignored
    role: WorkerRole
    address: str  # host:port of its gRPC services
    process_id: int
    device: DeviceProfile
    model: str
    max_model_len: int
    spec: KVCacheSpec
    num_blocks: int
    shape: ModelShape
    tensor_parallel_size: int = 1  # ranks; spec, num_blocks, shape and device are those of all together
    max_num_seqs: int = 64  # sequences in its batch
    max_num_batched_tokens: int = 512  # tokens it computes in one step
    vocab_size: int = 0
    version: str = ""  # of Twinpool, on the worker's machine
    node: str = ""  # its workers share memory and caches, and so slow each other; "": shares nothing
    checkpoint: str = ""  # digest of the files there


@message
@dataclass(frozen=True, slots=True)
class StepTimes:
    """Some like steps of one worker, added up: what the cost model learns from.

    Alike means: with about as many prompt tokens and as many decoding sequences, to a factor of two.
    """

    num_steps: int
    prompt_tokens: int  # computed in them
    prompt_pairs: int  # (prompt token, token of its context that it attends to, itself among them)
    decode_tokens: int  # one for each decoding sequence and step
    context_tokens: int  # whose KV the decoding sequences read
    seconds: float  # from planning a step to handing its tokens out, added up


@message
@dataclass(frozen=True, slots=True)
class TransferTimes:
    """Some handoffs from one prefill worker to one decode worker, added up."""

    address: str  # of the decode worker
    num_transfers: int
    num_bytes: int  # KV payload
    seconds: float  # of those bytes' way that were still to go when the prompt was computed, added up


@message
@dataclass(frozen=True, slots=True)
class PredictionErrors:
    """Median of |predicted - real| / real over the newest of each; None before the first.

    Each was predicted before the model learned from it.
    """

    prefill: float | None = None  # steps with prompts
    decode: float | None = None  # steps without
    transfer: float | None = None  # handoffs from here
    ttft: float | None = None  # requests whose prompts were computed here, from placement to first token
    tpot: float | None = None  # requests that decoded here, as predicted from the batch that they met


NO_ERRORS = PredictionErrors()


@message
@dataclass(frozen=True, slots=True)
class Prediction:
    """What is said of a request when it is placed, in seconds."""

    ttft_s: float
    tpot_s: float


@message
@dataclass(frozen=True, slots=True)
class TierLoad:
    """KV that a worker keeps outside its cache. Counters are of blocks."""

    tier: str  # "host" or "file"
    num_bytes: int
    hits: int  # brought back
    evictions: int
    unsaved: int = 0  # too much was under way
    damaged: int = 0  # refused and removed


@message
@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker's own count of its work, sent with every heartbeat. Counters grow for the life of the process."""

    running: int = 0
    waiting: int = 0
    blocks_free: int = 0
    blocks_leased: int = 0  # reserved for, or held by, a handoff under way
    blocks_unaccounted: int = 0  # must be 0
    prompt_tokens_computed: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens of sequences that began here
    prefix_cache_hits: int = 0  # those of them whose KV was cached: not computed, or not sent, once more
    transfers: int = 0
    transfer_bytes: int = 0  # KV payload received
    transfer_seconds: float = 0.0
    transfer_failures: tuple[tuple[str, int], ...] = ()  # (fault, count)
    blocks_resumed: int = 0  # of handoffs that broke: verified before, so they did not come again
    transfers_compressed: int = 0  # handoffs from here that were rounded for the way
    tiers: tuple[TierLoad, ...] = ()
    offered_bytes: int = 0  # KV payload sent back to prefill workers after a turn
    offers_dropped: int = 0  # turns that were not sent back for want of budget or room, or because it broke


@message
@dataclass(frozen=True, slots=True)
class CacheDelta:
    """Names of cached blocks that a worker has or lost since its delta before; of each name its first 8 bytes.

    A name tells where to send a request and nothing else: a wrong one costs time, never a wrong token.
    """

    sequence: int  # 0: forget what was known of this worker; else one more than the delta before
    added: bytes = b""  # NAME_BYTES each
    removed: bytes = b""


@message
@dataclass(frozen=True, slots=True)
class PrefixHashes:
    """Names of a prompt's full blocks: of every block whose end is a multiple of ``tokens_per_hash``, the last first.

    A prompt's blocks depend on the block size, so there is one of these for each block size in the cluster.
    """

    block_size: int
    tokens_per_hash: int  # a multiple of block_size
    hashes: tuple[int, ...]


class DutyState(StrEnum):
    """Whether a worker gets requests; ``scheduler.duties`` has the transitions."""

    ACTIVE = "active"
    DRAINING = "draining"  # nothing new; what was placed there ends
    DRAINED = "drained"  # nothing runs there, no KV waits to be taken


@message
@dataclass(frozen=True, slots=True)
class Duty:
    state: DutyState = DutyState.ACTIVE
    next_role: WorkerRole | None = None  # which a draining worker takes once it is empty
    move_after_s: float | None = None  # what decodes on a draining worker after so long goes on elsewhere


ACTIVE = Duty()


@message
@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One worker as the scheduler sees it."""

    info: WorkerInfo
    load: WorkerLoad
    requests_in_flight: int  # placed here and not yet finished, as the scheduler counts
    tokens_in_flight: int  # their prompt tokens (prefill) or prompt + max_tokens (decode)
    requests_placed: int  # since it registered: lets equal workers take turns
    last_heard_s: float  # monotonic seconds of the scheduler's clock
    errors: PredictionErrors = NO_ERRORS
    backlog_s: float = 0.0  # predicted seconds of prompts placed here whose first token is not out
    duty: Duty = ACTIVE


@message
@dataclass(frozen=True, slots=True)
class PoolLoad:
    """How a role's active workers stand to the work that arrives."""

    role: WorkerRole  # PREFILL or DECODE
    num_workers: int
    latency_s: float  # predicted for a request of the mean size, placed now: TTFT of prefill, TPOT of decode workers
    busyness: float  # work that arrives over what they can do; 1 is all
    wait_s: float = 0.0  # predicted for an interactive request until it gets a place, or room for its KV, here
    refused: float = 0.0  # part of the requests that come, where more workers here would have kept them


@message
@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """All live workers: what `twinpool status` shows."""

    workers: tuple[WorkerSnapshot, ...] = ()
    missing: tuple[str, ...] = field(default=())  # ids of workers that were launched and are not registered now
    epoch: int = 0  # another number after every restart of the scheduler: what it knew of requests is gone
    pools: tuple[PoolLoad, ...] = ()  # of the roles that have active workers; every few seconds anew
    queued_interactive: int = 0  # requests that wait for a worker
    queued_batch: int = 0


@message
@dataclass(frozen=True, slots=True)
class WorkerAddress:
    worker_id: str
    address: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one request runs. ``prefill`` is None when the decode worker prefills in place."""

    request_id: str
    decode: WorkerAddress
    prefill: WorkerAddress | None

    def __reduce__(self) -> tuple[Callable[..., Placement], tuple[str, ...]]:
        """As strings only: Ray's pickler asks Python about every object that is none of its own types."""
        both = (self.decode,) if self.prefill is None else (self.decode, self.prefill)
        return _placement, (self.request_id, *(part for each in both for part in (each.worker_id, each.address)))


def _placement(request_id: str, decode_id: str, decode_address: str, *prefill: str) -> Placement:
    return Placement(request_id, WorkerAddress(decode_id, decode_address), WorkerAddress(*prefill) if prefill else None)
