"""The model families that are read from GGUF: the names of their tensors and numbers, there and in ``transformers``.

Mistral comes as ``llama``, since it computes the same. A tensor or a family that is not listed is refused by name
rather than dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvcache.errors import ModelError
from workers.model.gguf_metadata import Metadata

EMBEDDING = "token_embd.weight"
OUTPUT_HEAD = "output.weight"
ROTARY_DIVISORS = "rope_freqs.weight"
"""What each rotary frequency is divided by (Llama 3.1 and later)."""

MODEL_TENSORS = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    OUTPUT_HEAD: "lm_head.weight",
}
_NORMS = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_ATTENTION = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
_HEAD_NORMS = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_GATED_MLP = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_MERGED = {
    "attn_qkv.weight": "self_attn.qkv_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_up.weight": "mlp.gate_up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_GEMMA_NORMS = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that every family has."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture of GGUF.

    ``pairs_rotary_rows``: the rows of query and key are in ggml's order for neighbouring pairs (see ``gguf_weights``).
    ``norm_offset``: what the file's norm weights hold more than those of ``transformers``.
    ``own_config`` gives the fields of config.json that only this family has.
    """

    architecture: str
    model_type: str
    class_name: str
    layer_tensors: Mapping[str, str]
    pairs_rotary_rows: bool = False
    norm_offset: float = 0.0
    own_config: Callable[[Metadata, Shape], dict[str, object]] = lambda _metadata, _shape: {}


def expected_shape(name: str, shape: Shape, vocab_size: int) -> tuple[int, ...]:
    """The shape of a weight by its name in ``transformers``."""
    query, key = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    rows = {"q": query, "k": key, "v": key, "qkv": query + 2 * key}
    rows |= {"gate": shape.intermediate_size, "up": shape.intermediate_size, "gate_up": 2 * shape.intermediate_size}
    part, _, kind = name.rpartition(".")
    part = part.rpartition(".")[2]
    if part in ("q_norm", "k_norm"):
        return (shape.head_size,)
    if part.endswith("norm"):
        return (shape.hidden_size,)
    if part in ("embed_tokens", "lm_head"):
        return (vocab_size, shape.hidden_size)
    if part == "o_proj":
        return (shape.hidden_size, query)
    if part == "down_proj":
        return (shape.hidden_size, shape.intermediate_size)
    num_rows = rows[part.removesuffix("_proj")]
    return (num_rows,) if kind == "bias" else (num_rows, shape.hidden_size)


def find_family(metadata: Metadata) -> Family:
    """The family that the file names. Raises ModelError for one that is not listed here."""
    architecture = metadata.text("general.architecture")
    if architecture not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ModelError(
            f"{metadata.path} holds the architecture {architecture!r}; what is read from GGUF are {known}."
        )
    return _FAMILIES[architecture]


def read_shape(metadata: Metadata, family: Family) -> Shape:
    """Raises ModelError for sizes that are missing or that this mapping would compute wrongly."""
    prefix = family.architecture
    num_heads = metadata.positive(f"{prefix}.attention.head_count")
    hidden_size = metadata.positive(f"{prefix}.embedding_length")
    head_size = metadata.positive(f"{prefix}.attention.key_length", max(1, hidden_size // num_heads))
    if metadata.positive(f"{prefix}.attention.value_length", head_size) != head_size:
        raise ModelError(f"{metadata.path} has keys and values of different sizes, which is not read from GGUF.")
    rotary_size = metadata.positive(f"{prefix}.rope.dimension_count", head_size)
    if rotary_size != head_size:
        raise ModelError(
            f"{metadata.path} rotates {rotary_size} of {head_size} head values; only whole heads are read from GGUF."
        )
    return Shape(
        num_layers=metadata.positive(f"{prefix}.block_count"),
        hidden_size=hidden_size,
        intermediate_size=metadata.positive(f"{prefix}.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=metadata.positive(f"{prefix}.attention.head_count_kv", num_heads),
        head_size=head_size,
    )


def rope_parameters(metadata: Metadata, family: Family) -> dict[str, object]:
    """``rope_parameters`` of ``transformers``. Raises ModelError for a scaling that is not known."""
    prefix = f"{family.architecture}.rope"
    parameters: dict[str, object] = {
        "rope_type": "default",
        "rope_theta": metadata.number(f"{prefix}.freq_base", 10_000.0),
    }
    scaling = metadata.text(f"{prefix}.scaling.type", "none")
    if scaling == "none":
        return parameters
    if scaling not in ("linear", "yarn"):
        raise ModelError(f"{metadata.path} scales its rotary positions by {scaling!r}, which is not read from GGUF.")
    parameters |= {"rope_type": scaling, "factor": metadata.number(f"{prefix}.scaling.factor")}
    if scaling == "yarn":
        parameters["original_max_position_embeddings"] = metadata.positive(f"{prefix}.scaling.original_context_length")
        for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
            if f"{prefix}.scaling.{key}" in metadata.values:
                raise ModelError(f"{metadata.path} sets {prefix}.scaling.{key}, which is not read from GGUF.")
        for key in ("beta_fast", "beta_slow"):
            if f"{prefix}.scaling.yarn_{key}" in metadata.values:
                parameters[key] = metadata.number(f"{prefix}.scaling.yarn_{key}")
    return parameters


def _phi3_config(metadata: Metadata, _shape: Shape) -> dict[str, object]:
    window = metadata.integer("phi3.attention.sliding_window", 0)
    return {"sliding_window": window or None}


def _gemma2_config(metadata: Metadata, shape: Shape) -> dict[str, object]:
    return {
        "sliding_window": metadata.positive("gemma2.attention.sliding_window", 4096),
        "attn_logit_softcapping": metadata.number("gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("gemma2.final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _gemma_attention_scalar(shape, largest_num_layers=46),
    }


def _gemma3_config(metadata: Metadata, shape: Shape) -> dict[str, object]:
    return {
        "sliding_window": metadata.positive("gemma3.attention.sliding_window"),
        "query_pre_attn_scalar": _gemma_attention_scalar(shape, largest_num_layers=62),
        # The file's base and scaling are those of the layers that see the whole context.
        "rope_parameters": {
            "full_attention": rope_parameters(metadata, _FAMILIES["gemma3"]),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.number("gemma3.rope.freq_base_swa", 10_000.0),
            },
        },
    }


def _gemma_attention_scalar(shape: Shape, largest_num_layers: int) -> int:
    """The file does not say it: only the largest of a family, of 27 B, scales by hidden size over heads."""
    return shape.hidden_size // shape.num_heads if shape.num_layers == largest_num_layers else shape.head_size


_FAMILIES = {
    family.architecture: family
    for family in (
        Family("llama", "llama", "LlamaForCausalLM", _NORMS | _ATTENTION | _GATED_MLP, pairs_rotary_rows=True),
        Family("qwen2", "qwen2", "Qwen2ForCausalLM", _NORMS | _ATTENTION | _BIASES | _GATED_MLP),
        Family("qwen3", "qwen3", "Qwen3ForCausalLM", _NORMS | _ATTENTION | _HEAD_NORMS | _GATED_MLP),
        Family("phi3", "phi3", "Phi3ForCausalLM", _NORMS | _MERGED, own_config=_phi3_config),
        Family(
            "gemma2",
            "gemma2",
            "Gemma2ForCausalLM",
            _GEMMA_NORMS | _ATTENTION | _GATED_MLP,
            norm_offset=1.0,
            own_config=_gemma2_config,
        ),
        Family(
            "gemma3",
            "gemma3_text",
            "Gemma3ForCausalLM",
            _GEMMA_NORMS | _ATTENTION | _HEAD_NORMS | _GATED_MLP,
            norm_offset=1.0,
            own_config=_gemma3_config,
        ),
    )
}
