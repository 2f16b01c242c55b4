"""A model of ``transformers`` written as GGUF, with the names of the gguf package and the conventions of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize
from torch import nn

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
}
# Where the float16 numbers of a block stand.
SCALES_OF_LARGE_BLOCKS = {gguf.GGMLQuantizationType.Q4_K: (0, 2), gguf.GGMLQuantizationType.Q6_K: (208,)}


def slow_gguf_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The order of llama.cpp, row by row: transformers row i of a head is row 2i, row i + half is row 2i + 1."""
    head_size = len(weight) // num_heads
    stored = np.zeros_like(weight)
    for head in range(num_heads):
        for pair in range(head_size // 2):
            first = head * head_size
            stored[first + 2 * pair] = weight[first + pair]
            stored[first + 2 * pair + 1] = weight[first + pair + head_size // 2]
    return stored


def write_model(
    file: Path,
    model: nn.Module,
    architecture: str,
    tokens: list[str],
    *,
    more: Mapping[str, Any] | None = None,
    divisors: np.ndarray | None = None,
    raw: Mapping[str, np.ndarray] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> None:
    """Every weight in float32, but for those that are in ``raw``, see ``round_matrices``, which are of ``kind``.

    ``more`` is metadata below the architecture's name.
    """
    config: Any = model.config
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for key, value in (more or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key}", value)
    add_tokens(writer, tokens)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored_name is not None, name
        if raw is not None and name in raw:
            writer.add_tensor(stored_name, _stored(name, raw[name], architecture, config), raw_dtype=kind)
        else:
            writer.add_tensor(stored_name, _stored(name, tensor.float().numpy(), architecture, config))
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def round_matrices(model: nn.Module, kind: gguf.GGMLQuantizationType) -> dict[str, np.ndarray]:
    """Rounds the matrices of ``model`` to what ``kind`` holds, in place: what a file stores of them, row by row.

    The gguf package does not round to types of 256 values. Of those the blocks are random, with small scales.
    """
    raw: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(5)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        if kind in SCALES_OF_LARGE_BLOCKS:
            raw[name] = _random_blocks(rng, parameter.shape, kind)
        else:
            raw[name] = quantize(parameter.detach().numpy(), kind)
        parameter.data.copy_(torch.from_numpy(dequantize(raw[name], kind)))
    return raw


def _random_blocks(rng: np.random.Generator, shape: torch.Size, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape.numel() // block_values, block_bytes), dtype=np.uint8)
    for start in SCALES_OF_LARGE_BLOCKS[kind]:
        scales = rng.uniform(2e-5, 1e-4, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def add_tokens(writer: GGUFWriter, tokens: list[str]) -> None:
    """A tokenizer of one merge. The first of ``tokens`` is a control token; "a", "b" and "ab" are among them."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)])
    writer.add_token_merges(["a b"])


def _stored(name: str, weight: np.ndarray, architecture: str, config: Any) -> np.ndarray:
    if architecture == "llama" and name.endswith("q_proj.weight"):
        return slow_gguf_rows(weight, config.num_attention_heads)
    if architecture == "llama" and name.endswith("k_proj.weight"):
        return slow_gguf_rows(weight, config.num_key_value_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    return weight
