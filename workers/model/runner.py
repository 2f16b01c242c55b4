"""One step: logits from the model, tokens from the sampler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvcache.errors import ModelError
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.request import TokenHistory, TokenLogprobs
from scheduler.step_plan import ScheduledChunk, StepOutput, StepPlan
from workers.model.comparison import compared_logits, differs_by, find_difference
from workers.model.fused_decoder import FusedDecoder, WeightFormat, find_misfit
from workers.model.logprobs import token_logprobs
from workers.model.narrow_model import find_other_structure
from workers.model.sampler import NotFiniteError, check_finite, sample
from workers.model.sequence_state import SequenceState
from workers.model.step_model import PreparedInputs, PreparingModel, StepLogits, StepModel
from workers.model.transformers_model import TransformersModel, load_model
from workers.native.library import missing_instructions
from workers.parallel.rank import Rank
from workers.step_progress import StepProgress
from workers.worker_options import WorkerOptions

QUANTIZED = {"int8": WeightFormat.INT8, "int4": WeightFormat.INT4}
logger = logging.getLogger(__name__)


class ModelRunner:
    """A model and its KV cache. One thread at a time may call ``execute``."""

    def __init__(self, model: StepModel, storage: PagedStorage) -> None:
        self.model = model
        self._storage = storage
        self._states: dict[str, SequenceState] = {}  # of the last step; others are made again from their tokens

    def prepare(self, plan: StepPlan) -> PreparedInputs | None:
        """Makes the inputs of a step while another one runs; None where the model knows no such thing."""
        inputs: PreparedInputs | None = None
        if isinstance(self.model, PreparingModel):
            inputs = self.model.prepare(plan, self._storage)
        return inputs

    @torch.inference_mode()
    def execute(
        self, plan: StepPlan, progress: StepProgress | None = None, inputs: PreparedInputs | None = None
    ) -> StepOutput:
        """Computes the chunks of ``plan``, fills their KV, and samples where a chunk has ``sampling``.

        ``progress`` hears of every layer whose KV is there, if the model can tell. ``inputs`` are those of ``prepare``,
        with all tokens. However the call ends, the device no longer works on the plan's blocks when it does.

        Raises:
            NotFiniteError: a sequence's logits hold NaN or infinity; no token was sampled for any. Names the sequence.
            NothingLeftError: the same, and a sequence's own parameters forbid every token.
        """
        try:
            return self._execute(plan, progress, inputs)
        finally:
            self._storage.synchronize()

    def _execute(self, plan: StepPlan, progress: StepProgress | None, inputs: PreparedInputs | None) -> StepOutput:
        computed = self.compute(plan, progress, inputs)
        logits, likeliest = computed.logits, computed.likeliest
        prompts, sampled = _rows_of(plan)
        prompt_logprobs = _prompt_logprobs(computed, prompts)
        if prompts:
            rows = [row for row, _ in sampled]
            logits, likeliest = logits[rows], [likeliest[row] for row in rows] if likeliest is not None else None
        chunks = [chunk for _, chunk in sampled]
        tokens = self._sample(StepLogits(logits, likeliest), chunks)
        return StepOutput(tokens, _logprobs(logits, chunks, tokens), prompt_logprobs)

    def compute(self, plan: StepPlan, progress: StepProgress | None, inputs: PreparedInputs | None) -> StepLogits:
        """The model's part of ``execute``, with the logits on the host, where tokens are chosen."""
        if isinstance(self.model, PreparingModel):
            return self.model.run(inputs if inputs is not None else self.model.prepare(plan, self._storage), progress)
        return StepLogits(self.model.logits(plan, self._storage, progress).cpu())

    def _sample(self, computed: StepLogits, chunks: Sequence[ScheduledChunk]) -> dict[str, int]:
        """One row and one token per chunk."""
        states = {row: self._state_of(chunk, chunk.history) for row, chunk in enumerate(chunks) if chunk.history}
        self._states = {chunks[row].request_id: state for row, state in states.items()}
        params = [chunk.sampling for chunk in chunks if chunk.sampling is not None]
        positions = [chunk.end for chunk in chunks]
        with _naming(lambda row: (chunks[row].request_id, chunks[row].end - 1)):
            tokens = sample(computed.logits, params, positions, states, computed.likeliest) if chunks else []
        return {chunk.request_id: token for chunk, token in zip(chunks, tokens, strict=True)}

    def _state_of(self, chunk: ScheduledChunk, history: TokenHistory) -> SequenceState:
        state = self._states.get(chunk.request_id)
        if state is None or not state.is_of(history):
            assert chunk.sampling is not None, "only a chunk that samples has a history"
            state = SequenceState(chunk.sampling, history)
        state.advance(history)
        return state


@contextmanager
def _naming(name_of: Callable[[int], tuple[str, int]]) -> Iterator[None]:
    """Names the sequence and the position of logits that are not finite; ``name_of`` a row gives both."""
    try:
        yield
    except NotFiniteError as error:
        request_id, position = name_of(error.row)
        raise NotFiniteError(error.row, f" of request {request_id} after position {position}") from None


def _rows_of(plan: StepPlan) -> tuple[list[tuple[int, ScheduledChunk]], list[tuple[int, ScheduledChunk]]]:
    """Where the logits of prompt targets begin, and where those to sample from are."""
    prompts, sampled = [], []
    row = 0
    for chunk in plan.chunks:
        if chunk.prompt_targets:
            prompts.append((row, chunk))
        row += chunk.num_logits
        if chunk.sampling is not None:
            sampled.append((row - 1, chunk))
    return prompts, sampled


def _prompt_logprobs(
    computed: StepLogits, prompts: Sequence[tuple[int, ScheduledChunk]]
) -> dict[str, tuple[TokenLogprobs, ...]]:
    told = {}
    for row, chunk in prompts:
        targets = chunk.prompt_targets
        span = slice(row, row + len(targets))
        rows = computed.logits[span]
        with _naming(lambda index, of=chunk: (of.request_id, of.end - of.num_logits + index)):  # type: ignore[misc]
            check_finite(rows, computed.likeliest[span] if computed.likeliest is not None else None)
        told[chunk.request_id] = tuple(token_logprobs(rows, targets, [chunk.num_prompt_logprobs] * len(targets)))
    return told


def _logprobs(
    logits: torch.Tensor, chunks: Sequence[ScheduledChunk], tokens: Mapping[str, int]
) -> dict[str, TokenLogprobs]:
    """Of the sampled tokens of those chunks that ask."""
    counts = {
        row: chunk.sampling.logprobs
        for row, chunk in enumerate(chunks)
        if chunk.sampling is not None and chunk.sampling.logprobs is not None
    }
    if not counts:
        return {}
    names = [chunks[row].request_id for row in counts]
    told = token_logprobs(logits[list(counts)], [tokens[name] for name in names], list(counts.values()))
    return dict(zip(names, told, strict=True))


def load_step_model(
    options: WorkerOptions, rank: Rank | None = None, report: Callable[[float], None] = lambda _part: None
) -> StepModel:
    """Loads the model of a worker, or of one rank of it; all ranks call this at the same time.

    ``report`` hears how far that is, from 0 to 1.

    Raises:
        ModelError: the checkpoint cannot be loaded, quantized or cut.
    """
    spec = options.spec if rank is None else rank.shard.of_spec(options.spec)
    path = Path(options.model_path)
    return choose_step_model(
        load_model(path, options.dtype, rank=rank, report=lambda part: report(part / 2)),
        spec,
        options.max_model_len,
        options.num_threads,
        options.quantization,
        rank,
        reload=lambda: load_model(path, options.dtype, rank=rank),
        report=lambda part: report((1 + part) / 2),
    )


def choose_step_model(
    model: Any,
    spec: KVCacheSpec,
    max_model_len: int,
    num_threads: int,
    quantization: str = "none",
    rank: Rank | None = None,
    *,
    reload: Callable[[], Any] | None = None,
    report: Callable[[float], None] = lambda _part: None,
) -> StepModel:
    """The fastest way to run ``model`` that gives its results, to what ``quantization`` costs.

    The native decoder must first do what the model's modules do, exactly, whatever its weights are; that is looked at
    in a small copy. Then its logits must be the model's to rounding, in which alone a mild difference would be lost.

    With a ``rank``, ``model`` and ``spec`` are cut to its share; all ranks choose the same. With ``reload`` the weights
    of ``model`` are dropped while they are packed, so that they are not held twice, and the model is loaded again in
    the rare case that it is needed after all. ``report`` hears which part has been packed.

    Raises:
        ModelError: the model is damaged, cannot be quantized here, or not run at all.
    """
    reference = TransformersModel(model, max_model_len=max_model_len, is_cut=rank is not None)
    # Compared are short steps only: windows and the like are what ``find_misfit`` and ``layers`` are for.
    expected = compared_logits(model)
    check_expected(model, expected, rank)
    misfit = find_misfit(model, spec, reference.layers) or find_other_structure(model, spec, num_threads, rank)
    was_packed = misfit is None
    if misfit is None:
        fused = FusedDecoder(
            model,
            spec,
            max(max_model_len, len(expected)),
            num_threads,
            QUANTIZED.get(quantization),
            rank,
            drops_packed=reload is not None,
            report=report,
        )
        weight_format = fused.weight_format.name.lower()
        difference = find_difference(model, fused, expected, spec, rank, weight_format)
        if difference is None:
            _warn_of_widening(weight_format, rank)
            return fused
        misfit = differs_by(difference)
        del fused  # before the model is loaded again
    if quantization != "none":
        raise ModelError(f"This model cannot be quantized to {quantization}: {misfit}.")
    if was_packed and reload is not None:
        model = reload()
        reference = TransformersModel(model, max_model_len=max_model_len, is_cut=rank is not None)
    excess = find_difference(model, reference, expected, spec, rank)
    if excess is not None:
        raise not_its_own_results(model, excess)
    logger.warning("This model runs through transformers: %s.", misfit)
    report(1.0)
    return reference


def _warn_of_widening(weight_format: str, rank: Rank | None) -> None:
    missing = missing_instructions(weight_format)
    if missing is not None and (rank is None or rank.shard.rank == 0):
        logger.warning(
            "%s weights are less to read, but prompts take about as long as in float32: this processor, or the native"
            " build for it, has no %s.",
            weight_format,
            missing,
        )


def check_expected(model: Any, expected: torch.Tensor, rank: Rank | None = None) -> None:
    """Of ``compared_logits``: nothing can be compared with them, and no token chosen, where they say nothing.

    Raises:
        ModelError: they are not finite, or all zero; names the checkpoint.
    """
    if not expected.isfinite().all():
        raise _not_finite(model)
    largest = float(expected.abs().max())
    if (largest if rank is None else rank.largest(largest)) == 0.0:
        raise ModelError(f"All logits of the model in {_source_of(model)} are zero: it is damaged.")


def _source_of(model: Any) -> str:
    return Path(getattr(model.config, "name_or_path", None) or "").name or "the checkpoint"


def _not_finite(model: Any) -> ModelError:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            source = _source_of(model)
            return ModelError(f"The weight {name} in {source} has values that are not finite: it is damaged.")
    dtype = next(model.parameters()).dtype
    return ModelError(f"The model's logits are not finite in {str(dtype).removeprefix('torch.')}.")


def not_its_own_results(model: Any, difference: float) -> ModelError:
    return ModelError(
        f"{type(model).__name__} does not give its own results with paged attention: {differs_by(difference)}."
    )
