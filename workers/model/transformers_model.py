"""Level 1: any causal language model of transformers, its attention replaced by ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from kvcache.errors import ModelError
from kvcache.storage import TORCH_DTYPES, PagedStorage
from scheduler.step_plan import StepPlan
from workers.model.attention.interface import AttentionBackend, StepAttention
from workers.model.attention.torch_backend import TorchAttention
from workers.model.attention_layers import LayerAttention, read_attention_layers
from workers.model.gguf_names import SUFFIX
from workers.model.gguf_weights import load_gguf_model
from workers.model.loading_bar import reported_to
from workers.parallel.modules import cut_modules
from workers.parallel.rank import Rank
from workers.step_progress import StepProgress

ATTENTION_NAME = "twinpool_paged"


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    paged_storage: PagedStorage | None = None,
    paged_attention: StepAttention | None = None,
    paged_layers: Sequence[LayerAttention] = (),
    paged_progress: LayerListener | None = None,
    **_kwargs: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls instead of its own attention.

    ``query``, ``key`` and ``value`` are ``[1, heads, T, head_size]``; the result is ``[1, T, heads, head_size]``.
    """
    assert paged_storage is not None and paged_attention is not None, "the model was called without a step's inputs"
    index: int = module.layer_idx  # type: ignore[assignment]
    attended = paged_attention.attend(
        paged_storage.layers[index],
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        paged_layers[index],
        scaling if scaling is not None else query.shape[-1] ** -0.5,
    )
    if paged_progress is not None:
        paged_progress.layer_done(index)
    return attended.unsqueeze(0), None


def _no_mask(*_args: object, **_kwargs: object) -> None:
    """Paged attention masks by itself; transformers need not build a mask."""


AttentionInterface.register(ATTENTION_NAME, _attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def load_model(
    path: Path,
    dtype: str,
    device: str = "cpu",
    rank: Rank | None = None,
    report: Callable[[float], None] = lambda _part: None,
) -> nn.Module:
    """Loads a checkpoint, a folder with safetensors or a GGUF file, with attention replaced by ours.

    Weights that are stored in ``dtype`` stay mapped. ``report`` hears which part has been read, from 0 to 1.

    With a ``rank``, cut to its share: weights stay in the mapped file until they are cut, so only those are read.

    Raises:
        ModelError: the weights cannot be read or do not fit the configuration, or the model cannot be cut.
    """
    disable_progress_bar()  # several workers load at once; the launcher shows how far they are
    set_verbosity_error()  # it reports tensors that are missing as "newly initialized"; _check_tensors refuses them
    try:
        if path.suffix == SUFFIX:
            model: nn.Module = load_gguf_model(path, TORCH_DTYPES[dtype], ATTENTION_NAME, report)
        else:
            with reported_to(report):
                model = _load_safetensors(path, TORCH_DTYPES[dtype] if rank is None else "auto")
        if rank is not None:
            _cut_to_share(model, TORCH_DTYPES[dtype], rank)
        report(1.0)
        return model.to(device).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"The model in {path} cannot be loaded: {error}") from error


def _load_safetensors(path: Path, dtype: torch.dtype | str) -> nn.Module:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=ATTENTION_NAME,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # looked at below: transformers' own error names none of them
        output_loading_info=True,
    )
    model: nn.Module = loaded[0]
    loading = loaded[1]
    _check_shapes(path, loading["mismatched_keys"])
    _check_tensors(path, loading["missing_keys"], loading["unexpected_keys"])
    return model


def _check_shapes(path: Path, mismatched: Collection[tuple[str, torch.Size, torch.Size]]) -> None:
    """``mismatched``: name, shape in the checkpoint, shape by the configuration."""
    if mismatched:
        name, stored, expected = min(mismatched)
        raise ModelError(
            f"{path} has {len(mismatched)} tensors of another shape than its configuration says"
            f" ({name}: {list(stored)} and not {list(expected)})."
        )


def _check_tensors(path: Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    """transformers fills what a checkpoint lacks with random numbers, and passes over what it does not know.

    Tied weights are not among ``missing``, nor what a model is known to do without among ``unexpected``.
    """
    for tensors, problem in ((missing, "lacks {} of the model's weights"), (unexpected, "has {} tensors too many")):
        if tensors:
            names = ", ".join(sorted(tensors)[:3]) + (", ..." if len(tensors) > 3 else "")
            raise ModelError(f"{path} {problem.format(len(tensors))} ({names}).")


def _cut_to_share(model: Any, dtype: torch.dtype, rank: Rank) -> None:
    loaded_dtype = model.dtype
    cut_modules(model, rank.shard, rank.all_reduce)
    for parameter in model.parameters():
        if parameter.dtype == loaded_dtype:  # others are kept exact on purpose
            parameter.data = parameter.data.to(dtype)


class LayerListener(Protocol):
    def layer_done(self, layer: int) -> None:
        """All KV of ``layer`` that this step computes is in the cache."""
        ...


class _WhenSummed:
    """Of one rank of several: who computes a layer's attention has the sum of the layer before, and so knows that the
    other ranks have written that one. The last layer is told by the step's end."""

    def __init__(self, progress: LayerListener) -> None:
        self._progress = progress

    def layer_done(self, layer: int) -> None:
        if layer > 0:
            self._progress.layer_done(layer - 1)


class TransformersModel:
    """A ``StepModel`` over a loaded model. One thread at a time may call it.

    ``layers`` says what attention each layer does, in sequences no longer than ``max_model_len``.
    """

    def __init__(
        self,
        model: Any,
        device: str = "cpu",
        max_model_len: int | None = None,
        *,
        is_cut: bool = False,
        attention: AttentionBackend | None = None,
    ) -> None:
        """``model`` is ours from here on: it computes without dropout, and with our attention where it had another.

        ``max_model_len`` is by default what the model was made for. ``is_cut``: ``model`` is one rank's share, and
        the other ranks write the rest of the KV. ``attention`` computes on ``device``, where the model is; it is
        portable torch if not given.

        Raises:
            ModelError: a layer's attention is none that paged attention does.
        """
        self._model = model.eval()
        self._device = device
        self._is_cut = is_cut
        longest = max_model_len or model.config.max_position_embeddings
        self.layers = read_attention_layers(model, longest, is_cut=is_cut)
        model.set_attn_implementation(ATTENTION_NAME)
        self._windows = {layer.window for layer in self.layers}
        self.attention = attention if attention is not None else TorchAttention(device)

    def logits(self, plan: StepPlan, storage: PagedStorage, progress: StepProgress | None = None) -> torch.Tensor:
        """See ``StepModel.logits``."""
        step = self.attention.plan(plan, storage.spec, self._windows)
        inputs = step.inputs
        return self.forward(inputs.token_ids, inputs.positions, step, storage, inputs.logit_rows, progress)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: StepAttention,
        storage: PagedStorage,
        rows: torch.Tensor | None = None,
        progress: StepProgress | None = None,
    ) -> torch.Tensor:
        """Logits of ``rows`` of a packed row, by default of all: ``[rows, vocabulary]``. Both inputs are ``[1, T]``."""
        listener: LayerListener | None = progress
        if progress is not None and self._is_cut:
            listener = _WhenSummed(progress)
        output = self._model(
            input_ids=token_ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=rows if rows is not None else 0,
            paged_storage=storage,
            paged_attention=attention,
            paged_layers=self.layers,
            # A layer on a GPU is only queued when its attention returns; there the step's end tells.
            paged_progress=listener if self._device == "cpu" else None,
        )
        logits: torch.Tensor = output.logits[0]
        return logits
