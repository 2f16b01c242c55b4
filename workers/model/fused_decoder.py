"""The common decoder, fast: a whole step in one native call, made from the weights of a loaded transformers model.

Chosen by the structure of the modules and not by the model's name, and compared with the model it replaces when it
is loaded. What does not fit stays with transformers.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import nn

from kvcache.errors import InvariantError, ResourceError
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.step_plan import StepPlan
from workers.model.attention_layers import LayerAttention
from workers.model.step_model import StepLogits
from workers.native.library import SEQUENCE, Parts, Shape, Step, load_library
from workers.parallel.rank import Rank, RankLostError
from workers.step_progress import StepProgress

HEAD_SIZE_MULTIPLE = 16  # the widest vector of any build
_RANK_LOST = 2  # what twinpool_step returns


class WeightFormat(IntEnum):
    """``Format`` of decoder.cpp."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3


class LinearIndex(IntEnum):
    """``TwinpoolLinear`` of decoder.cpp."""

    QUERY = 0
    KEY = 1
    VALUE = 2
    OUTPUT = 3
    GATE = 4
    UP = 5
    DOWN = 6
    HEAD = 7
    EMBEDDING = 8


class VectorIndex(IntEnum):
    """``TwinpoolVector``."""

    INPUT_NORM = 0
    POST_NORM = 1
    QUERY_NORM = 2
    KEY_NORM = 3
    FINAL_NORM = 4


class CacheFormat(IntEnum):
    """``TwinpoolCacheFormat``."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    FP8 = 3


CACHE_FORMATS = {
    "float32": CacheFormat.FLOAT32,
    "bfloat16": CacheFormat.BFLOAT16,
    "int8": CacheFormat.INT8,
    "fp8": CacheFormat.FP8,
}
WEIGHT_FORMATS = {torch.float32: WeightFormat.FLOAT32, torch.bfloat16: WeightFormat.BFLOAT16}

# A loaded model is typed Any here: whether it has the parts that are read below is what find_misfit finds out.


def find_misfit(model: Any, spec: KVCacheSpec, layers: Collection[LayerAttention]) -> str | None:
    """Names the first thing about the model's structure that the fused decoder does not do, or None.

    ``layers`` is what ``read_attention_layers`` found for the context that is served. It must be looked at: a few
    tokens, which are all that is compared at load, do not show a window.
    """
    if load_library() is None:
        return "there is no native build for this processor"
    if spec.dtype not in CACHE_FORMATS:
        return f"the native decoder's KV is {', '.join(CACHE_FORMATS)}, not {spec.dtype}"
    if spec.head_size % HEAD_SIZE_MULTIPLE:
        return f"the head size {spec.head_size} is no multiple of {HEAD_SIZE_MULTIPLE}"
    body: Any = getattr(model, "model", None)
    if not isinstance(getattr(body, "layers", None), nn.ModuleList):
        return "there is no list of decoder layers"
    if set(dict(body.named_children())) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return "the model has parts beside embedding, layers, norm and rotary embedding"
    if not isinstance(getattr(model, "lm_head", None), nn.Linear) or model.lm_head.bias is not None:
        return "there is no output head without bias"
    if model.lm_head.weight.dtype not in WEIGHT_FORMATS:
        return f"the native decoder's weights are float32 or bfloat16, not {model.lm_head.weight.dtype}"
    problems = (_layer_misfit(layer) for layer in body.layers)
    return next(filter(None, problems), None) or _rotary_misfit(body, spec) or _unseen_misfit(model, layers)


def _rotary_misfit(body: Any, spec: KVCacheSpec) -> str | None:
    """The decoder has one table of angles, for whole heads, that all layers use."""
    frequencies = getattr(body.rotary_emb, "inv_freq", None)
    if frequencies is None:
        return "its rotary embedding differs from layer to layer"
    if 2 * frequencies.numel() != spec.head_size:
        return "its rotary embedding turns a part of each head only"
    if not all(getattr(layer.self_attn, "use_rope", True) for layer in body.layers):
        return "some layers have no rotary embedding"
    return None


def _unseen_misfit(model: Any, layers: Collection[LayerAttention]) -> str | None:
    """What no module shows."""
    for layer in layers:
        if layer.window is not None:
            return f"its attention has a sliding window of {layer.window} tokens"
        if layer.softcap is not None:
            return "its attention scores are soft-capped"
    scales = {getattr(layer.self_attn, "scaling", None) for layer in model.model.layers}
    if len(scales) > 1 or None in scales:
        return "its layers do not name one scale of attention"
    # Tanh changes small logits by less than rounding does: a few tokens may not show it.
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        return "its logits are soft-capped"
    return None


_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMED_ATTENTION_PARTS = _ATTENTION_PARTS | {"q_norm", "k_norm"}
_MERGED_ATTENTION_PARTS = {"qkv_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}
_MERGED_MLP_PARTS = {"gate_up_proj", "down_proj"}


def _layer_misfit(layer: Any) -> str | None:
    # Dropout does nothing in a model that is served.
    parts = {name for name, part in layer.named_children() if not isinstance(part, nn.Dropout)}
    if parts != _LAYER_PARTS:
        return f"a layer has the parts {sorted(parts)}"
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        if set(dict(norm.named_parameters())) != {"weight"} or not hasattr(norm, "variance_epsilon"):
            return f"its norm is {type(norm).__name__}"
    attention = set(dict(layer.self_attn.named_children()))
    if attention not in (_ATTENTION_PARTS, _NORMED_ATTENTION_PARTS, _MERGED_ATTENTION_PARTS):
        return f"attention has the parts {sorted(attention)}"
    if layer.self_attn.o_proj.bias is not None:
        return "the attention's output has a bias"
    return _mlp_misfit(layer.mlp)


def _mlp_misfit(mlp: Any) -> str | None:
    activation = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    linears = {name: part for name, part in mlp.named_children() if part is not activation}
    if set(linears) not in (_MLP_PARTS, _MERGED_MLP_PARTS) or activation is None:
        return f"the MLP has the parts {sorted(dict(mlp.named_children()))}"
    sample = torch.linspace(-4, 4, 9)
    if not torch.allclose(activation(sample), nn.functional.silu(sample)):
        return "the MLP's activation is not SiLU"
    if any(linear.bias is not None for linear in linears.values()):
        return "the MLP has biases"
    return None


@dataclass(frozen=True, slots=True)
class _Projection:
    """A linear layer, or one part of the outputs of a merged one."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def _projections(layer: Any, spec: KVCacheSpec) -> dict[LinearIndex, _Projection]:
    """The linear layers of a decoder layer, merged ones taken apart: query, key, value; gate, up."""
    attention, mlp = layer.self_attn, layer.mlp
    kv_size = spec.num_kv_heads * spec.head_size
    if hasattr(attention, "qkv_proj"):
        query_size = attention.qkv_proj.weight.shape[0] - 2 * kv_size
        query, key, value = _split(attention.qkv_proj, [query_size, kv_size, kv_size])
    else:
        query, key, value = (_whole(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(mlp, "gate_up_proj"):
        gate, up = _split(mlp.gate_up_proj, [mlp.gate_up_proj.weight.shape[0] // 2] * 2)
    else:
        gate, up = _whole(mlp.gate_proj), _whole(mlp.up_proj)
    return {
        LinearIndex.QUERY: query,
        LinearIndex.KEY: key,
        LinearIndex.VALUE: value,
        LinearIndex.OUTPUT: _whole(attention.o_proj),
        LinearIndex.GATE: gate,
        LinearIndex.UP: up,
        LinearIndex.DOWN: _whole(mlp.down_proj),
    }


def _whole(linear: Any) -> _Projection:
    return _Projection(linear.weight, linear.bias)


def _split(linear: Any, sizes: list[int]) -> list[_Projection]:
    biases = linear.bias.split(sizes) if linear.bias is not None else [None] * len(sizes)
    return [_Projection(weight, bias) for weight, bias in zip(linear.weight.split(sizes), biases, strict=True)]


@dataclass(frozen=True, slots=True)
class NativeInputs:
    """A step as the native code takes it, and what it points into."""

    step: Step
    token_ids: np.ndarray  # int64, [rows]
    _kept: tuple[object, ...]

    def set_tokens(self, token_ids: Sequence[int]) -> None:
        """Of a step that was planned ahead, one row per sequence."""
        self.token_ids[:] = token_ids


class FusedDecoder:
    """A decoder whose weights are packed for the native code. One thread at a time may call it.

    The weights are copies: the model that they came from may be dropped.
    """

    def __init__(
        self,
        model: Any,
        spec: KVCacheSpec,
        max_model_len: int,
        num_threads: int,
        weight_format: WeightFormat | None = None,
        rank: Rank | None = None,
        *,
        drops_packed: bool = False,
        report: Callable[[float], None] = lambda _part: None,
    ) -> None:
        """Packs the weights, by default in their own dtype.

        With a ``rank``, ``model`` and ``spec`` are cut to its share, and every rank calls the same. With
        ``drops_packed`` each layer of ``model`` gives its memory back as soon as it is packed, and the model is of no
        use afterwards. ``report`` hears after every layer which part has been packed, from 0 to 1.
        """
        library = load_library()
        assert library is not None, "find_misfit was not asked"
        self._library = library
        self._num_threads = num_threads
        self.parts: Parts | None = None  # when set, each step adds where its time went
        self.weight_format = weight_format if weight_format is not None else WEIGHT_FORMATS[model.lm_head.weight.dtype]
        config = model.config
        self._rank = rank
        layer = model.model.layers[0]
        projections = _projections(layer, spec)
        self.vocab_size = len(model.lm_head.weight)  # of this rank
        shape = Shape(
            num_layers=spec.num_layers,
            hidden_size=config.hidden_size,
            num_heads=len(projections[LinearIndex.QUERY].weight) // spec.head_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            intermediate_size=len(projections[LinearIndex.GATE].weight),
            vocab_size=self.vocab_size,
            block_size=spec.block_size,
            norm_epsilon=model.model.norm.variance_epsilon,
            attention_scale=layer.self_attn.scaling,
            weight_format=self.weight_format,
            cache_format=CACHE_FORMATS[spec.dtype],
            first_token=rank.shard.of(config.vocab_size).start if rank is not None else 0,
        )
        self._decoder = ctypes.c_void_p(library.twinpool_create(ctypes.byref(shape)))
        if not self._decoder:
            raise ResourceError("There is no memory for the native decoder.")
        self._set_weights(model, spec, drops_packed, report)
        self._cosine, self._sine = _rotary_tables(model, max_model_len)

    def __del__(self) -> None:
        if getattr(self, "_decoder", None):
            self._library.twinpool_destroy(self._decoder)

    def logits(self, plan: StepPlan, storage: PagedStorage, progress: StepProgress | None = None) -> torch.Tensor:
        """See ``StepModel.logits``; in float32, and of a rank only those of its part of the vocabulary."""
        return self.run(self.prepare(plan, storage), progress).logits

    def logits_of_rows(self, plan: StepPlan, storage: PagedStorage, rows: list[int]) -> torch.Tensor:
        """Logits after any tokens of a step, counted over its chunks in order: ``[len(rows), vocabulary]``."""
        return self.run(self._inputs(plan, storage, rows), None).logits

    def prepare(self, plan: StepPlan, storage: PagedStorage) -> NativeInputs:
        """See ``PreparingModel.prepare``. Any thread may call it while a step runs."""
        return self._inputs(plan, storage, plan.logit_rows)

    def run(self, inputs: NativeInputs, progress: StepProgress | None) -> StepLogits:
        """See ``PreparingModel.run``."""
        step = inputs.step
        logits = np.empty((step.num_sampled, self.vocab_size), dtype=np.float32)
        likeliest = np.empty(step.num_sampled, dtype=np.int64)
        step.logits = logits.ctypes.data
        step.likeliest = likeliest.ctypes.data
        step.layers_done = progress.counter_address if progress is not None else None
        step.wake_fd = progress.wake_fd if progress is not None else -1
        step.parts = ctypes.pointer(self.parts) if self.parts is not None else None
        status = self._library.twinpool_step(self._decoder, ctypes.byref(step), self._num_threads)
        if status == _RANK_LOST:
            raise RankLostError("another rank did not come to a sum in time")
        if status:
            raise ResourceError(f"There is no memory for a step of {step.num_rows} tokens.")
        return StepLogits(torch.from_numpy(logits), likeliest.tolist())

    def _inputs(self, plan: StepPlan, storage: PagedStorage, rows: list[int]) -> NativeInputs:
        chunks = plan.chunks
        if max(chunk.end for chunk in chunks) > len(self._cosine):
            raise InvariantError(f"a sequence is longer than the {len(self._cosine)} tokens that were promised")
        lengths = [len(chunk.token_ids) for chunk in chunks]
        num_rows = sum(lengths)
        token_ids = np.fromiter(itertools.chain.from_iterable(chunk.token_ids for chunk in chunks), np.int64, num_rows)
        blocks = np.fromiter(itertools.chain.from_iterable(chunk.block_table for chunk in chunks), np.int64)
        sequences, row, table = [], 0, blocks.ctypes.data
        for chunk, length in zip(chunks, lengths, strict=True):
            sequences.append((row, length, chunk.start, 0, table))
            row += length
            table += len(chunk.block_table) * blocks.itemsize
        packed_sequences = np.array(sequences, dtype=SEQUENCE)
        sampled_rows = np.array(rows, dtype=np.int64)
        cache_layers = np.array([layer.data_ptr() for layer in storage.layers], dtype=np.uintp)
        step = Step(
            num_rows=num_rows,
            num_sequences=len(chunks),
            num_sampled=len(rows),
            token_ids=token_ids.ctypes.data,
            cosine=self._cosine.ctypes.data,
            sine=self._sine.ctypes.data,
            sequences=packed_sequences.ctypes.data,
            sampled_rows=sampled_rows.ctypes.data,
            cache_layers=cache_layers.ctypes.data,
            group=ctypes.pointer(self._rank.native_group) if self._rank is not None else None,
        )
        return NativeInputs(step, token_ids, (blocks, packed_sequences, sampled_rows, cache_layers, storage))

    def _set_weights(self, model: Any, spec: KVCacheSpec, drops_packed: bool, report: Callable[[float], None]) -> None:
        body = model.model
        for index, layer in enumerate(body.layers):
            for which, projection in _projections(layer, spec).items():
                self._set_linear(index, which, projection.weight, projection.bias)
            self._set_vector(index, VectorIndex.INPUT_NORM, layer.input_layernorm.weight)
            self._set_vector(index, VectorIndex.POST_NORM, layer.post_attention_layernorm.weight)
            if hasattr(layer.self_attn, "q_norm"):
                self._set_vector(index, VectorIndex.QUERY_NORM, layer.self_attn.q_norm.weight)
                self._set_vector(index, VectorIndex.KEY_NORM, layer.self_attn.k_norm.weight)
            if drops_packed:
                _drop_weights(layer)
            report((index + 1) / (len(body.layers) + 1))
        self._set_vector(0, VectorIndex.FINAL_NORM, body.norm.weight)
        head, embedding = model.lm_head.weight, body.embed_tokens.weight
        self._set_linear(0, LinearIndex.HEAD, head, None)
        if head.data_ptr() != embedding.data_ptr():  # a tied embedding is read out of the packed head
            self._set_linear(0, LinearIndex.EMBEDDING, embedding, None)
        if drops_packed:
            _drop_weights(model)
        report(1.0)

    def _set_linear(self, layer: int, which: LinearIndex, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        weight = weight.detach().float().contiguous()
        bias = bias.detach().float().contiguous() if bias is not None else None
        failed = self._library.twinpool_set_linear(
            self._decoder,
            layer,
            int(which),
            weight.data_ptr(),
            bias.data_ptr() if bias is not None else None,
            *weight.shape,
        )
        if failed:
            raise ResourceError("There is no memory for the packed weights.")

    def _set_vector(self, layer: int, which: VectorIndex, values: torch.Tensor) -> None:
        values = values.detach().float().contiguous()
        self._library.twinpool_set_vector(self._decoder, layer, int(which), values.data_ptr(), values.numel())


def _drop_weights(module: nn.Module) -> None:
    """Gives the memory back to the system, whoever else holds the module."""
    for parameter in module.parameters():
        parameter.data = torch.empty(0)
    # glibc keeps what lies between pieces that are in use; after a layer that is most of it.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _rotary_tables(model: Any, max_model_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every position, each ``[max_model_len, head_size]`` float32, from the model's own module."""
    positions = torch.arange(max_model_len).unsqueeze(0)
    with torch.inference_mode():
        cosine, sine = model.model.rotary_emb(torch.zeros(1, 1), positions)
    return cosine[0].float().contiguous().numpy(), sine[0].float().contiguous().numpy()
