"""Which architectures are described for serving, and which are refused, from config.json and the headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from kvcache.errors import ModelError
from tests.families import CONTEXT, FAMILIES, LONG_ROPE, ROPE, SHAPE, gemma3, llama
from workers.model.architecture import check_architecture, load_config, read_sizes
from workers.model.safetensors_file import TensorHeader

VOCAB_SIZE = 97


def described(folder: Path, config: PreTrainedConfig) -> Any:
    """The sizes of a checkpoint with this configuration, read back from its config.json."""
    config.save_pretrained(folder)
    loaded = load_config(folder)
    check_architecture(folder, loaded, [])
    return read_sizes(folder, loaded)


def refusal(folder: Path, config: PreTrainedConfig, headers: list[TensorHeader] | None = None) -> str:
    config.save_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        check_architecture(folder, load_config(folder), headers or [])
    return str(caught.value)


def config_of(model_type: str, **values: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **values)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_described(tmp_path: Path, name: str) -> None:
    config: Any = FAMILIES[name](VOCAB_SIZE)
    sizes = described(tmp_path, config)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert (sizes.num_layers, sizes.num_kv_heads) == (config.num_hidden_layers, kv_heads)
    assert sizes.head_size == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert sizes.max_position_embeddings == (256 if "longrope" in name else CONTEXT)


REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "latent attention": (config_of("deepseek_v3"), "multi-head latent attention"),
    "Mamba": (config_of("mamba"), "MambaForCausalLM keeps a recurrent state"),
    "Mamba beside attention": (config_of("jamba"), "JambaForCausalLM keeps a recurrent state"),
    "linear attention": (config_of("qwen3_next"), "recurrent state"),
    "ALiBi, Bloom": (config_of("bloom"), "ALiBi position biases"),
    "ALiBi, MPT": (config_of("mpt"), "ALiBi position biases"),
    "ALiBi, Falcon": (config_of("falcon", alibi=True), "ALiBi position biases (alibi)"),
    "a class of its own attention": (
        config_of("falcon", alibi=False),
        "attention of FalconForCausalLM cannot be replaced",
    ),
    "an encoder-decoder": (config_of("t5"), "encoder-decoder"),
    "an encoder": (config_of("bert"), "it is an encoder"),
    "sinks": (config_of("gpt_oss"), "attention sinks"),
    "chunked attention": (config_of("llama4_text"), "chunked local attention"),
    "images": (config_of("gemma3"), "combines several models (text_config, vision_config)"),
    "bidirectional": (gemma3(use_bidirectional_attention=True)(VOCAB_SIZE), "bidirectional attention"),
    "shared KV": (config_of("gemma3n_text"), "layers that share one KV cache"),
    "twice per layer": (config_of("diffllama"), "calls attention twice per layer"),
    "dynamic rope": (llama({"rope_type": "dynamic", "factor": 4.0})(VOCAB_SIZE), "rotary embedding (dynamic)"),
    "dynamic rope in some layers": (
        gemma3(
            rope_parameters={
                "sliding_attention": ROPE | {"rope_type": "default"},
                "full_attention": ROPE | {"rope_type": "dynamic", "factor": 4.0},
            }
        )(VOCAB_SIZE),
        "rotary embedding (dynamic)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_by_the_name_of_what_is_missing(tmp_path: Path, name: str) -> None:
    config, reason = REFUSED[name]
    sentence = refusal(tmp_path, config)
    assert reason in sentence
    assert sentence.startswith(f"{tmp_path} ({config.model_type}) cannot run here: ")
    assert "\n" not in sentence


def test_a_context_beyond_the_original_one_is_not_served_with_longrope(tmp_path: Path) -> None:
    """Angles change for all sequences of a step when one is longer."""
    long = LONG_ROPE | {"original_max_position_embeddings": 64}
    long |= {factor: [1.0] * (SHAPE["head_dim"] // 2) for factor in ("short_factor", "long_factor")}
    assert described(tmp_path, llama(long)(VOCAB_SIZE)).max_position_embeddings == 64
