"""What the machine can do, what the model asks of it, and how near an engine came."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kvcache.errors import ModelError
from kvcache.spec import KVCacheSpec
from workers.model.checkpoint import CheckpointInfo, read_tensor_headers
from workers.model.fused_decoder import WeightFormat
from workers.model.shape import HEAD_BYTES, WEIGHT_BYTES
from workers.native.library import load_library

GEMM_SIZES = (512, 1024, 2048)
READ_BYTES = 256 << 20  # well beyond the last cache level
READ_ROWS = 1024  # of the matrix that a product reads: its vectors stay in the caches
MULTIPLY_ROUNDS = 1 << 20  # some milliseconds
REPEATS = 3


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Of as many threads as torch has now. Best and not mean: what others do on the machine is no limit of it."""

    gemm_gflops: float  # torch, float32
    read_gb_s: float
    peak_gflops: float | None = None  # of multiply-adds alone in the weights' dtype; None: not a native format

    def better_of(self, other: MachineLimits) -> MachineLimits:
        peaks = [peak for peak in (self.peak_gflops, other.peak_gflops) if peak is not None]
        return MachineLimits(
            max(self.gemm_gflops, other.gemm_gflops),
            max(self.read_gb_s, other.read_gb_s),
            max(peaks) if peaks else None,
        )


def measure_limits(weight_dtype: str = "float32") -> MachineLimits:
    """Large float32 matrix products, multiply-adds alone, and the best of several ways to read a long buffer; about
    two seconds.

    A single way is no limit: where the sum of a vector waits for its additions, a product with a matrix, which is
    what decoding is, reads two to four times as fast. The native decoder's own step is no way to read here, for a
    limit that is taken from what is measured against it says nothing.
    """
    gemm_flops_s = 0.0
    for size in GEMM_SIZES:
        left, right, product = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
        seconds = _best_seconds(partial(torch.mm, left, right, out=product))
        gemm_flops_s = max(gemm_flops_s, 2 * size**3 / seconds)
    read_s = min(_best_seconds(read) for read in ways_to_read(torch.ones(READ_BYTES // 4)))
    return MachineLimits(gemm_flops_s / 1e9, READ_BYTES / read_s / 1e9, _peak_gflops(weight_dtype))


def _peak_gflops(weight_dtype: str) -> float | None:
    library = load_library()
    weight_format = getattr(WeightFormat, weight_dtype.upper(), None)
    if library is None or weight_format is None:
        return None
    multiply = partial(library.twinpool_multiply, weight_format, MULTIPLY_ROUNDS, torch.get_num_threads())
    return 2 * multiply() / _best_seconds(multiply) / 1e9


def ways_to_read(values: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """Each reads all of ``values``, a float32 vector of a multiple of ``READ_ROWS``, once."""
    matrix = values.view(READ_ROWS, -1)
    ways: list[Callable[[], torch.Tensor]] = [
        values.sum,
        partial(torch.dot, values, values),
        partial(torch.mv, matrix, torch.ones(matrix.shape[1])),
        partial(torch.mv, matrix.t(), torch.ones(READ_ROWS)),
    ]
    library = load_library()
    if library is not None:
        read = partial(library.twinpool_read, values.data_ptr(), values.numel(), torch.get_num_threads())
        ways.append(lambda: torch.tensor(read()))
    return ways


def _best_seconds(work: Callable[[], object]) -> float:
    work()  # the first call allocates and chooses kernels
    seconds = []
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """The arithmetic and the memory traffic that cannot be avoided. A multiply-add is 2 FLOP.

    Counted: the matrices of the layers, the head for each row whose logits are needed, and causal attention
    (per layer, head and pair of positions: ``head_size`` multiply-adds for the score and as many for the value).
    Left out, being under 1 %: norms, rotary embedding, activations, embedding rows, KV writes.
    """

    layer_weights: int  # elements
    head_weights: int  # vocabulary times hidden size, tied or not
    attention_width: int  # layers times heads times head size
    weight_bytes: float  # of one element of a layer
    head_bytes: float  # of one element of the head
    kv_token_bytes: int  # of one token over all layers

    def prefill_flops(self, num_tokens: int) -> float:
        """One prompt, with the logits of its last token only."""
        pairs = num_tokens * (num_tokens + 1) / 2
        return 2 * self.layer_weights * num_tokens + 2 * self.head_weights + 4 * self.attention_width * pairs

    def decode_flops(self, batch: int, context: float) -> float:
        """One step of ``batch`` sequences that attend to ``context`` tokens each, the new one among them."""
        return batch * (2 * (self.layer_weights + self.head_weights) + 4 * self.attention_width * context)

    def decode_bytes(self, batch: int, context: float) -> float:
        """What such a step reads: every weight once, and the KV of every sequence."""
        weights = self.layer_weights * self.weight_bytes + self.head_weights * self.head_bytes
        return weights + batch * context * self.kv_token_bytes


def read_costs(checkpoint: CheckpointInfo, spec: KVCacheSpec, weight_dtype: str) -> ModelCosts:
    """From the shapes in the weight files.

    Raises:
        ModelError: a token uses only some of the weights, so that they say nothing of its cost.
    """
    headers = read_tensor_headers(checkpoint.path)
    if any("expert" in header.name for header in headers):
        raise ModelError(f"{checkpoint.architecture} is a mixture of experts, whose cost per token is not known here.")
    # Inside the layers a tensor's name holds the layer's number: model.layers.7.mlp.up_proj.weight.
    in_layers = [header for header in headers if any(part.isdecimal() for part in header.name.split("."))]
    return ModelCosts(
        layer_weights=sum(header.num_elements for header in in_layers if len(header.shape) > 1),
        head_weights=checkpoint.vocab_size * checkpoint.hidden_size,
        attention_width=checkpoint.num_layers * checkpoint.num_attention_heads * checkpoint.head_size,
        weight_bytes=WEIGHT_BYTES[weight_dtype],
        head_bytes=HEAD_BYTES[weight_dtype],
        kv_token_bytes=spec.token_bytes,
    )
