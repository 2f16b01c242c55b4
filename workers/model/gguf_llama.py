"""A Llama checkpoint in GGUF, turned into the folder that ``transformers`` reads.

``transformers`` has a GGUF path of its own, but it takes minutes where dequantising whole tensors takes
seconds. The mapping covers the ``llama`` architecture; whatever it does not know is refused by name
rather than dropped.

llama.cpp stores the rows of the query and key projections in another order than transformers, because
its rotary embedding turns neighbouring pairs (2i, 2i+1) where transformers turns halves (i, i + size/2)::

    one head of size 8     transformers   0 1 2 3 | 4 5 6 7
                           GGUF           0 4 1 5 2 6 3 7
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# gguf has no type stubs for its reader's fields; what leaves this module is typed.
from gguf import GGUFReader, ReaderTensor
from gguf.quants import QuantError, dequantize

from kvcache.errors import ModelError
from workers.model.gguf_tokenizer import TokenizerMetadata, write_tokenizer
from workers.model.progress import Progress
from workers.model.safetensors_file import SINGLE_FILE
from workers.model.safetensors_writer import TensorShape, write_float32

OUTPUT_HEAD = "output.weight"

_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    OUTPUT_HEAD: "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The numbers of the architecture, as the file's metadata states them."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tied_embeddings: bool


def convert_gguf_llama(source: Path, target: Path, progress: Progress) -> None:
    """Writes weights (float32), config and tokenizer of ``source`` into the existing folder ``target``.

    float32 holds every dequantised value exactly. Raises ModelError for a file that is not a Llama GGUF
    or holds something that this mapping does not know; ``target`` is then incomplete and the caller's to
    remove. OSError (a full disk) is passed on.
    """
    progress.step(f"Reading {source.name} ...")
    reader = open_gguf(source)
    shape = read_shape(reader)
    tokenizer = read_tokenizer_metadata(reader)
    # Names are checked before anything is written, so that an unknown file fails at once.
    names = [transformers_name(tensor.name) for tensor in reader.tensors]
    _refuse_missing(names, shape)
    write_tokenizer(tokenizer, target, shape.max_position_embeddings)
    _write_json(target / "config.json", transformers_config(shape, tokenizer))
    _write_json(target / "generation_config.json", _special_ids(tokenizer))
    progress.step(f"Converting {len(names)} tensors to float32 ...")
    shapes = [
        TensorShape(name, tuple(int(size) for size in reversed(tensor.shape)))
        for name, tensor in zip(names, reader.tensors, strict=True)
    ]
    tensors = progress.over(_weights(reader, shape), total=len(names), label="converting")
    write_float32(target / SINGLE_FILE, shapes, tensors)


def open_gguf(source: Path) -> GGUFReader:
    """Maps the file; raises ModelError when it is not GGUF."""
    try:
        return GGUFReader(source)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{source} is not a readable GGUF file: {type(error).__name__}: {error}.") from error


def transformers_name(gguf_name: str) -> str:
    """The parameter name in ``LlamaForCausalLM``. A tensor outside the mapping is a ModelError."""
    layer = _LAYER_NAME.fullmatch(gguf_name)
    if layer and layer[2] in _LAYER_TENSORS:
        return f"model.layers.{layer[1]}.{_LAYER_TENSORS[layer[2]]}"
    if gguf_name in _MODEL_TENSORS:
        return _MODEL_TENSORS[gguf_name]
    raise ModelError(f"The GGUF file holds the tensor {gguf_name}, which the Llama mapping does not know.")


def _refuse_missing(names: list[str], shape: LlamaShape) -> None:
    expected = {name for gguf_name, name in _MODEL_TENSORS.items() if gguf_name != OUTPUT_HEAD}
    expected |= {
        f"model.layers.{layer}.{name}" for layer in range(shape.num_layers) for name in _LAYER_TENSORS.values()
    }
    if missing := expected.difference(names):
        raise ModelError(f"The GGUF file lacks {len(missing)} tensors of its model, {min(missing)} among them.")


def restore_row_order(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection back in transformers' order (see the module's picture).

    ``weight``: (num_heads * head_size, hidden_size), returned with the same shape.
    """
    num_rows, num_columns = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def read_shape(reader: GGUFReader) -> LlamaShape:
    """The architecture's numbers; ModelError for another architecture, or for rotary variants we do not convert."""
    architecture = field(reader, "general.architecture")
    if architecture != "llama":
        raise ModelError(f"The GGUF file holds the architecture {architecture!r}; only 'llama' is converted.")
    num_heads = int(field(reader, "llama.attention.head_count"))
    hidden_size = int(field(reader, "llama.embedding_length"))
    head_size = int(field(reader, "llama.attention.key_length", hidden_size // num_heads))
    shape = LlamaShape(
        num_layers=int(field(reader, "llama.block_count")),
        hidden_size=hidden_size,
        intermediate_size=int(field(reader, "llama.feed_forward_length")),
        num_attention_heads=num_heads,
        num_kv_heads=int(field(reader, "llama.attention.head_count_kv", num_heads)),
        head_size=head_size,
        vocab_size=len(field(reader, "tokenizer.ggml.tokens")),
        max_position_embeddings=int(field(reader, "llama.context_length")),
        rms_norm_eps=_shortest_float(field(reader, "llama.attention.layer_norm_rms_epsilon")),
        rope_theta=_shortest_float(field(reader, "llama.rope.freq_base", 10_000.0)),
        tied_embeddings=all(tensor.name != OUTPUT_HEAD for tensor in reader.tensors),
    )
    _refuse_rotary_variants(reader, shape)
    return shape


def _refuse_rotary_variants(reader: GGUFReader, shape: LlamaShape) -> None:
    rotary_size = int(field(reader, "llama.rope.dimension_count", shape.head_size))
    if rotary_size != shape.head_size:
        raise ModelError(
            f"The GGUF file rotates {rotary_size} of {shape.head_size} head values; only whole heads are converted."
        )
    scaling = field(reader, "llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(f"The GGUF file scales its rotary positions ({scaling}), which is not converted.")


def read_tokenizer_metadata(reader: GGUFReader) -> TokenizerMetadata:
    """The tokenizer's part of the metadata, unchecked but typed."""
    template = field(reader, "tokenizer.chat_template", "")
    return TokenizerMetadata(
        model=str(field(reader, "tokenizer.ggml.model")),
        pre_tokenizer=str(field(reader, "tokenizer.ggml.pre", "default")),
        tokens=tuple(field(reader, "tokenizer.ggml.tokens")),
        token_types=tuple(field(reader, "tokenizer.ggml.token_type")),
        merges=tuple(field(reader, "tokenizer.ggml.merges")),
        bos_token_id=_optional_id(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_optional_id(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_optional_id(reader, "tokenizer.ggml.padding_token_id"),
        unknown_token_id=_optional_id(reader, "tokenizer.ggml.unknown_token_id"),
        adds_bos=bool(field(reader, "tokenizer.ggml.add_bos_token", False)),
        adds_eos=bool(field(reader, "tokenizer.ggml.add_eos_token", False)),
        chat_template=str(template),
    )


def transformers_config(shape: LlamaShape, tokenizer: TokenizerMetadata) -> dict[str, object]:
    """The content of config.json for ``LlamaForCausalLM``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **_special_ids(tokenizer),
    }


def _special_ids(tokenizer: TokenizerMetadata) -> dict[str, object]:
    ids = asdict(tokenizer)
    return {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if ids[name] is not None}


def _weights(reader: GGUFReader, shape: LlamaShape) -> Iterator[np.ndarray]:
    """Float32 tensors in the file's order, in transformers' row order, one at a time."""
    for tensor in reader.tensors:
        weight = _dequantized(tensor)
        if tensor.name.endswith(".attn_q.weight"):
            weight = restore_row_order(weight, shape.num_attention_heads)
        elif tensor.name.endswith(".attn_k.weight"):
            weight = restore_row_order(weight, shape.num_kv_heads)
        yield weight


def _dequantized(tensor: ReaderTensor) -> np.ndarray:
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, QuantError) as error:
        raise ModelError(f"The GGUF tensor {tensor.name} cannot be read: {error}.") from error


_REQUIRED = object()


def field(reader: GGUFReader, key: str, default: object = _REQUIRED) -> Any:
    """One metadata value as plain Python; a missing one is the default, or a ModelError without one."""
    entry = reader.get_field(key)
    if entry is not None:
        return entry.contents()
    if default is _REQUIRED:
        raise ModelError(f"The GGUF file has no metadata {key}, which a Llama model needs.")
    return default


def _optional_id(reader: GGUFReader, key: str) -> int | None:
    value = field(reader, key, None)
    return None if value is None else int(value)


def _shortest_float(value: float) -> float:
    """A float32 from the metadata as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
