"""What attention every layer of a loaded model asks for: read from a call of the model, not from its name.

transformers gives each layer a mask, and its own attention obeys that mask alone: some models have a window that
only the mask shows, and others name a window that their mask does not have. So the masks are what counts here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvcache.errors import ModelError

PROBE_NAME = "twinpool_probe"
PROBE_TOKENS = 2
UNSUPPORTED_ARGUMENTS = {
    "s_aux": "attention sinks",
    "head_mask": "a mask of heads",
    "position_bias": "a bias added to attention's scores",
}
# transformers' form of a mask: (batch, head, query position, key position) → whether the query sees the key.
MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """How a layer differs from plain causal attention.

    ``window`` is the number of tokens that a query sees, itself included; None where that is all of any sequence.
    ``softcap`` bounds the scores: ``softcap * tanh(score / softcap)``.
    """

    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the attention function."""

    layer_index: int | None
    mask: object
    softcap: float | None
    key_shape: torch.Size
    value_shape: torch.Size
    unsupported: tuple[str, ...]


def _record_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    attention_calls: list[_Call] | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Notes what was asked for and answers with zeros in the right shape."""
    assert attention_calls is not None, "the model was called without a list for its calls"
    index = getattr(module, "layer_idx", None)
    unsupported = tuple(text for name, text in UNSUPPORTED_ARGUMENTS.items() if kwargs.get(name) is not None)
    attention_calls.append(_Call(index, attention_mask, softcap, key.shape, value.shape, unsupported))
    batch_size, num_heads, num_tokens, _ = query.shape
    return query.new_zeros(batch_size, num_tokens, num_heads, value.shape[-1]), None


def _mask_itself(*_args: object, mask_function: MaskFunction, **_kwargs: object) -> MaskFunction:
    """Hands the layers the function that describes their mask, in place of a mask."""
    return mask_function


AttentionInterface.register(PROBE_NAME, _record_attention)
AttentionMaskInterface.register(PROBE_NAME, _mask_itself)


@torch.inference_mode()
def read_attention_layers(model: Any, max_model_len: int, *, is_cut: bool = False) -> tuple[LayerAttention, ...]:
    """Calls the model on two tokens to learn the attention of each layer, for sequences up to ``max_model_len``.

    Of a model that ``is_cut`` all ranks make this call together, and one that is lost ends it with a RuntimeError.

    Raises:
        ModelError: a layer asks for something that paged attention does not do.
    """
    name = type(model).__name__
    calls = _recorded_calls(model, is_cut)
    if [call.layer_index for call in calls] != list(range(model.config.num_hidden_layers)):
        raise ModelError(f"{name} does not call attention once in each of its layers, in their order.")
    if len({shape for call in calls for shape in (call.key_shape, call.value_shape)}) > 1:
        raise ModelError(f"The keys and values of {name} differ in shape, which one paged KV cache cannot hold.")
    for call in calls:
        if call.unsupported:
            raise ModelError(f"{name} uses {', '.join(call.unsupported)}, which paged attention does not do.")
    masks = {id(call.mask): call.mask for call in calls}
    windows = {key: _window_of(mask, max_model_len, name) for key, mask in masks.items()}
    return tuple(LayerAttention(windows[id(call.mask)], call.softcap) for call in calls)


@torch.inference_mode()
def own_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """What transformers' own attention gives after each token of one sequence: ``[T, vocabulary]``."""
    with _attention(model, "eager"):
        logits: torch.Tensor = model(torch.tensor([token_ids], device=model.device), use_cache=False).logits[0]
    return logits


def _recorded_calls(model: Any, is_cut: bool) -> list[_Call]:
    positions = torch.arange(PROBE_TOKENS, device=model.device).unsqueeze(0)
    calls: list[_Call] = []
    with _attention(model, PROBE_NAME):
        try:
            model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False, attention_calls=calls)
        except (TypeError, AttributeError, ValueError, LookupError, RuntimeError, AssertionError) as error:
            if is_cut and isinstance(error, RuntimeError):
                raise
            # A model that computes with its mask, or does not hand its arguments on to attention.
            raise ModelError(f"The attention of {type(model).__name__} cannot be replaced: {error}") from error
    return calls


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """Another attention function for a while."""
    if not model._can_set_attn_implementation():
        raise ModelError(f"The attention of {type(model).__name__} cannot be replaced.")
    usual = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _window_of(mask: object, max_model_len: int, model_name: str) -> int | None:
    """The window of a mask function, or None if every token sees all before it. Its own words are not trusted: it
    is asked about the last position and others, and must answer as one causal window does."""
    if not callable(mask):
        raise ModelError(f"{model_name} gives a layer no causal mask that transformers can describe.")
    keys = torch.arange(max_model_len)
    last = max_model_len - 1
    window = int(_seen(mask, last, keys, model_name).sum())
    for position in {0, window - 1, window, last // 3, last // 2, last - 1, last} & set(range(max_model_len)):
        expected = (keys <= position) & (keys > position - window)
        if not torch.equal(_seen(mask, position, keys, model_name), expected):
            raise ModelError(f"{model_name} has a layer whose mask is neither causal nor a sliding window.")
    return None if window >= max_model_len else window


def _seen(mask: MaskFunction, position: int, keys: torch.Tensor, model_name: str) -> torch.Tensor:
    first = torch.zeros((), dtype=torch.long)
    try:
        return mask(first, first, torch.tensor(position), keys).expand(len(keys))
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ModelError(f"{model_name} has a layer whose mask depends on more than positions: {error}") from error
