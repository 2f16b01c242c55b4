"""A loaded model's structure without its weights: the same class with as many layers, so narrow that it costs nothing.

Rounding hides what a model does otherwise than another of the same modules: with weights in 8 bits, logits are as far
from the exact ones as those of a model that multiplies its residuals by 0.7. So structures are compared on a copy whose
weights are random, exact, and large enough for all parts of a layer to count. Made from the configuration alone it is
the same in every rank of a group, and holds nothing of the model twice.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from kvcache.spec import KVCacheSpec
from workers.model.comparison import compared_logits, differs_by, find_difference
from workers.model.fused_decoder import FusedDecoder
from workers.parallel.rank import Rank

VOCAB_SIZE = 101
INTERMEDIATE_SIZE = 80
HIDDEN_PER_HEAD = 16


def find_other_structure(model: Any, spec: KVCacheSpec, num_threads: int, rank: Rank | None = None) -> str | None:
    """What shows that ``model``, in which ``find_misfit`` found nothing, is not what the native decoder computes.

    Of a model that is cut every rank looks at the same whole copy, and hears the same.
    """
    try:
        narrow, narrow_spec = narrow_copy(model, spec)
        expected = compared_logits(narrow)
    except (TypeError, AttributeError, ValueError, LookupError, RuntimeError, AssertionError) as error:
        # A class that wants more of its configuration than what we change fits together for.
        return f"there is no small copy of it to compare: {' '.join(str(error).split())}"
    fused = FusedDecoder(narrow, narrow_spec, len(expected), num_threads)
    difference = find_difference(narrow, fused, expected, narrow_spec, rank)
    return differs_by(difference) if difference is not None else None


def narrow_copy(model: Any, spec: KVCacheSpec) -> tuple[Any, KVCacheSpec]:
    """``model``, whole, in float32 and with few heads, and its KV in float32. Heads are as wide as those of ``spec``.

    The number of layers stays, for what a layer does may depend on where it is. Widths are multiples of three where
    they can be, so that no factor that a model derives from its width is 1 by chance.
    """
    config = copy.deepcopy(model.config)
    num_heads, num_kv_heads = _heads_like(config)
    config.vocab_size = VOCAB_SIZE
    config.pad_token_id = None  # it may lie beyond
    # Where a head's size is not named it is the part of the hidden size that falls to a head.
    config.hidden_size = num_heads * (HIDDEN_PER_HEAD if getattr(config, "head_dim", None) else spec.head_size)
    config.intermediate_size = INTERMEDIATE_SIZE
    config.num_attention_heads, config.num_key_value_heads = num_heads, num_kv_heads
    narrow = type(model)(config).float().eval()
    _draw_weights(narrow)
    return narrow, KVCacheSpec(spec.num_layers, num_kv_heads, spec.head_size, spec.block_size, "float32")


def _heads_like(config: Any) -> tuple[int, int]:
    """Few heads and KV heads, shared in the same way: a KV head for each, one for all, or several for several."""
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if num_kv_heads == num_heads:
        return 3, 3
    return (3, 1) if num_kv_heads == 1 else (6, 2)


def _draw_weights(model: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    embedding = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.dim() < 2:  # norms and biases: ones and zeros would hide whether they are used
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            scale = 1.0 if parameter is embedding else parameter.shape[-1] ** -0.5
            parameter.data.normal_(0.0, scale, generator=generator)
