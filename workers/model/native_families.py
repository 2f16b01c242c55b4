"""Families that the native decoder is known not to run. Imports nothing heavy.

What else does not fit is found when the model is there, by ``fused_decoder.find_misfit``.
"""

from __future__ import annotations

_EXPERTS = "its layers are mixtures of experts"
_GEMMA = "its norms and activation are Gemma's"
_LAYER_NORM = "it has layer norms and learned positions"

NOT_NATIVE = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _LAYER_NORM,
    "mixtral": _EXPERTS,
    "opt": _LAYER_NORM,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
}
