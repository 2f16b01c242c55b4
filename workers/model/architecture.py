"""Which architectures can run: causal models of ``transformers`` whose every layer is full or sliding attention.

Level 1 of Twinpool's model execution replaces a model's attention function by paged attention. That is only
right when the function is all there is: same keys and values for every earlier position in the window, softmax
over them, one pair of key and value per token and layer. Anything else would run and give wrong text, so it is
refused here, by name, before a weight is loaded. What a configuration does not show is found by
``attention_layers`` and by ``comparison`` when the model is there.

Importing this module imports ``transformers`` and torch (about 2 s).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from kvcache.errors import ModelError
from workers.model.safetensors_file import TensorHeader

FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})  # angles that depend on the position alone
LONG_ROPE = "longrope"  # two sets of angles: fixed for contexts that need only the first
SERVED_LAYERS = ("full_attention", "sliding_attention")

# Configuration fields that, when set, change attention itself, and what they stand for.
ATTENTION_FIELDS = {
    "alibi": "ALiBi position biases",
    "kv_lora_rank": "multi-head latent attention, whose keys and values differ in size",
    "attention_chunk_size": "chunked local attention",
    "index_topk": "sparse attention",
    "index_topk_blocks": "sparse attention",
    "num_kv_shared_layers": "layers that share one KV cache",
    "use_bidirectional_attention": "bidirectional attention",
    "add_cross_attention": "cross-attention",
}

# Model types whose attention differs in code that no configuration field shows.
ATTENTION_IN_CODE = {
    "bloom": "adds ALiBi position biases to its attention scores",
    "diffllama": "calls attention twice per layer",
    "doge": "computes its attention mask from the values",
    "gpt_oss": "uses attention sinks",
    "hrm_text": "runs its layers several times per token",
    "jetmoe": "chooses attention heads per token",
    "mpt": "adds ALiBi position biases to its attention scores",
}


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The numbers that the KV cache and the scheduler need."""

    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int


def refuse_raw_config(folder: Path, raw: dict[str, Any]) -> None:
    """What can be told from config.json alone, before ``transformers`` interprets it."""
    if "model_type" not in raw:
        raise ModelError(f"{folder / 'config.json'} names no model_type.")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ModelError(f"{folder} is quantized ({method}); give the unquantized checkpoint.")


def load_config(folder: Path) -> PretrainedConfig:
    """config.json as ``transformers`` understands it, never with code from the checkpoint."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{folder / 'config.json'} is not a configuration that transformers can use: {reason}"
        ) from error


def check_architecture(folder: Path, config: PretrainedConfig, headers: list[TensorHeader]) -> str:
    """The class name that will run this checkpoint, or a ModelError with the reason why none can."""
    refusal = (
        _refuse_attention(config, headers)  # first, for it says more than "cannot be replaced"
        or _refuse_kind(config)
        or _refuse_class(config)
        or _refuse_layers(config)
        or _refuse_rotary(config)
    )
    if refusal:
        raise ModelError(f"{folder} ({config.model_type}) cannot run here: {refusal}.")
    return _causal_class(config).__name__


def _causal_class(config: PretrainedConfig) -> Any:
    """The class, or None. Loading it imports that model's code from the installed ``transformers`` only."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _refuse_kind(config: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, and only decoder-only models generate from one sequence"
    if config.sub_configs:
        return f"it combines several models ({', '.join(sorted(config.sub_configs))}), and only text models are served"
    # Encoders that can also decode (BERT and its kin) declare the switch on their class.
    if hasattr(type(config), "is_decoder") and not config.is_decoder:
        return "it is an encoder (is_decoder is false), which does not generate text"
    return None


def _refuse_class(config: PretrainedConfig) -> str | None:
    model_class = _causal_class(config)
    if model_class is None:
        return "transformers has no causal language model class for it"
    name = model_class.__name__
    if config.architectures and name not in config.architectures:
        return f"it was saved as {', '.join(config.architectures)}, and only {name} generates text"
    # Before the interface check: "keeps a state" says more than "cannot be replaced".
    if model_class._is_stateful:
        return f"{name} keeps a recurrent state (Mamba or linear attention) instead of only keys and values"
    if not model_class._supports_attention_backend:
        return f"the attention of {name} cannot be replaced through transformers' attention interface"
    return None


def _refuse_layers(config: PretrainedConfig) -> str | None:
    kinds = set(_field(config, "layer_types") or ()) - set(SERVED_LAYERS)
    served = " and ".join(SERVED_LAYERS)
    return f"it has layers of type {', '.join(sorted(kinds))}, and only {served} are served" if kinds else None


def _refuse_rotary(config: PretrainedConfig) -> str | None:
    """Angles that depend on the longest sequence of a step would let one request change another's tokens."""
    for parameters in _rotary_parameters(config):
        kind = parameters.get("rope_type", "default")
        if kind == LONG_ROPE and isinstance(parameters.get("original_max_position_embeddings"), int):
            continue  # read_sizes keeps the context where the angles are fixed
        if kind not in FIXED_ROPE_TYPES:
            return f"its rotary embedding ({kind}) depends on the length of the sequences that share a step"
    return None


def _rotary_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """One set of parameters, or one for each type of layer."""
    parameters = _field(config, "rope_parameters")
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _refuse_attention(config: PretrainedConfig, headers: list[TensorHeader]) -> str | None:
    if config.model_type in ATTENTION_IN_CODE:
        return f"it {ATTENTION_IN_CODE[config.model_type]}"
    for name, meaning in ATTENTION_FIELDS.items():
        if _field(config, name):
            return f"it uses {meaning} ({name})"
    if any(header.name.endswith(".sinks") for header in headers):
        return "it uses attention sinks"
    return None


def _field(config: PretrainedConfig, name: str) -> Any:
    """A configuration field, or None. One that differs per layer is refused: our KV cache has one shape."""
    try:
        return getattr(config, name, None)
    except RuntimeError as error:
        # transformers raises a RuntimeError of its own for fields of a heterogeneous configuration.
        raise ModelError(f"The {config.model_type} checkpoint's {name} differs from layer to layer.") from error


def read_sizes(folder: Path, config: PretrainedConfig) -> ModelSizes:
    """The sizes, with ``transformers``' defaults: as many KV heads as heads, and heads that split the hidden size.

    With longrope the context is the original one: a longer sequence would turn all angles of its step to another set.
    """
    contexts = [_size(folder, config, "max_position_embeddings")]
    contexts += [
        parameters["original_max_position_embeddings"]
        for parameters in _rotary_parameters(config)
        if parameters.get("rope_type") == LONG_ROPE
    ]
    num_heads = _size(folder, config, "num_attention_heads")
    hidden_size = _size(folder, config, "hidden_size")
    return ModelSizes(
        num_layers=_size(folder, config, "num_hidden_layers"),
        num_attention_heads=num_heads,
        num_kv_heads=_size(folder, config, "num_key_value_heads", num_heads),
        head_size=_size(folder, config, "head_dim", hidden_size // num_heads),
        hidden_size=hidden_size,
        vocab_size=_size(folder, config, "vocab_size"),
        max_position_embeddings=min(contexts),
    )


def _size(folder: Path, config: PretrainedConfig, name: str, default: int | None = None) -> int:
    value = _field(config, name)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{folder / 'config.json'} gives {name} as {value!r} where a positive number belongs.")
    return value
