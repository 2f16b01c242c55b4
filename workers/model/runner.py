"""One step: logits from the model, tokens from the sampler."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvcache.errors import ModelError
from kvcache.spec import KVCacheSpec
from kvcache.storage import PagedStorage
from scheduler.request import SamplingParams, TokenHistory, TokenLogprobs
from scheduler.step_plan import ScheduledChunk, StepOutput, StepPlan
from workers.model.attention_layers import own_logits
from workers.model.fused_decoder import FusedDecoder, WeightFormat, find_misfit
from workers.model.logprobs import token_logprobs
from workers.model.sampler import NotFiniteError, check_finite, sample
from workers.model.sequence_state import SequenceState
from workers.model.step_model import PreparedInputs, PreparingModel, StepLogits, StepModel
from workers.model.transformers_model import TransformersModel, load_model
from workers.native.library import missing_instructions
from workers.parallel.rank import Rank
from workers.step_progress import StepProgress
from workers.worker_options import WorkerOptions

# Of two implementations' logits, by what weights and KV are rounded to: rounding gives some 1e-6 in float32, 1e-3 in
# float16, 1e-2 in bfloat16, 1e-1 in int8 and fp8; an error in the structure gives 1.
MAX_RELATIVE_DIFFERENCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 3e-1, "fp8": 3e-1, "int4": 6e-1}
QUANTIZED = {"int8": WeightFormat.INT8, "int4": WeightFormat.INT4}
COMPARED_TOKENS = 24  # or as many as the model has positions for
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

    With a ``rank``, ``model`` and ``spec`` are cut to its share; all ranks choose the same. With ``reload`` the weights
    of ``model`` are dropped while they are packed, so that they are not held twice, and the model is loaded again in
    the rare case that it is needed after all. ``report`` hears which part has been packed.

    Raises:
        ModelError: the model is damaged, cannot be quantized here, or not run at all.
    """
    reference = TransformersModel(model, max_model_len=max_model_len, is_cut=rank is not None)
    # Compared are short steps only: windows and the like are what ``find_misfit`` and ``layers`` are for.
    vocab_size = int(model.config.vocab_size)  # of all ranks
    expected = compared_logits(model)
    check_expected(model, expected, rank)
    misfit = find_misfit(model, spec, reference.layers)
    was_packed = misfit is None
    pack = partial(FusedDecoder, model, spec, max(max_model_len, len(expected)), num_threads, rank=rank)
    differs = partial(_difference_of, expected=expected, spec=spec, vocab_size=vocab_size, rank=rank)
    if misfit is None and quantization == "int4":  # may cost as much as an error would: compared in 8 bits
        misfit = differs(pack(WeightFormat.INT8))
    if misfit is None:
        fused = pack(QUANTIZED.get(quantization), drops_packed=reload is not None, report=report)
        misfit = differs(fused)
        if misfit is None:
            _warn_of_widening(fused.weight_format.name.lower(), rank)
            return fused
        del fused  # before the model is loaded again
    if quantization != "none":
        raise ModelError(f"This model cannot be quantized to {quantization}: {misfit}.")
    if was_packed and reload is not None:
        reference = TransformersModel(reload(), max_model_len=max_model_len, is_cut=rank is not None)
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


def compared_logits(model: Any) -> torch.Tensor:
    """What ``model`` gives by itself after each of the tokens that ``find_difference`` compares."""
    positions = getattr(model.config, "max_position_embeddings", None) or COMPARED_TOKENS
    return own_logits(model, compared_tokens(int(model.config.vocab_size), min(COMPARED_TOKENS, positions)))


def find_difference(
    model: Any, step_model: StepModel, expected: torch.Tensor, spec: KVCacheSpec, rank: Rank | None = None
) -> float | None:
    """How far a way to run ``model`` is from its ``compared_logits``, if that is more than rounding explains."""
    # The median, for rounding may send a token to another expert, and that token only.
    differences = relative_differences(expected, step_model, spec, int(model.config.vocab_size))
    difference = _largest(statistics.median(differences), rank)
    allowed = _allowed_difference(str(model.dtype).removeprefix("torch."), spec.dtype)
    return difference if difference > allowed else None


def check_expected(model: Any, expected: torch.Tensor, rank: Rank | None = None) -> None:
    """Of ``compared_logits``: nothing can be compared with them, and no token chosen, where they say nothing.

    Raises:
        ModelError: they are not finite, or all zero; names the checkpoint.
    """
    if not expected.isfinite().all():
        raise _not_finite(model)
    if _largest(float(expected.abs().max()), rank) == 0.0:
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
        f"{type(model).__name__} does not give its own results with paged attention: its logits differ by"
        f" {difference:.2g} of the largest."
    )


def _difference_of(
    fused: FusedDecoder, expected: torch.Tensor, spec: KVCacheSpec, vocab_size: int, rank: Rank | None
) -> str | None:
    """By how much the logits differ, in words, if that is more than rounding gives."""
    difference = _largest(max(relative_differences(expected, fused, spec, vocab_size)), rank)
    if difference <= _allowed_difference(fused.weight_format.name.lower(), spec.dtype):
        return None
    return f"its logits differ by {difference:.2g} of the largest"


def _allowed_difference(*dtypes: str) -> float:
    """``dtypes``: what weights and KV are rounded to."""
    return max(MAX_RELATIVE_DIFFERENCE[dtype] for dtype in dtypes)


def _largest(difference: float, rank: Rank | None) -> float:
    """Over all ranks, so that all come to the same decision."""
    return difference if rank is None else rank.largest(difference)


def relative_differences(
    expected: torch.Tensor, step_model: StepModel, spec: KVCacheSpec, vocab_size: int
) -> list[float]:
    """Runs a few steps: how far the logits of each token are from ``expected``, over the largest of them.

    ``expected`` is of ``compared_logits``, of a rank its part of them. It is where the model computes.
    """
    plans = _comparison_plans(spec.block_size, compared_tokens(vocab_size, len(expected)))
    num_blocks = 1 + max(block for plan in plans for chunk in plan.chunks for block in chunk.block_table)
    storage = PagedStorage(spec, num_blocks, str(expected.device))
    # Of a rank all may be zero, where its part of the vocabulary is not used.
    largest = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    differences = []
    for plan in plans:
        rows = expected[[chunk.end - 1 for chunk in plan.chunks]].float()
        found = step_model.logits(plan, storage).float()
        differences += [float(row) / largest for row in (found - rows).abs().amax(dim=-1)]
    return [difference if math.isfinite(difference) else math.inf for difference in differences]


def compared_tokens(vocab_size: int, count: int = COMPARED_TOKENS) -> tuple[int, ...]:
    """The tokens that a model is given before it serves."""
    return tuple((37 * i + 11) % vocab_size for i in range(count))


def _comparison_plans(block_size: int, token_ids: Sequence[int]) -> tuple[StepPlan, ...]:
    """A prompt in two chunks beside a single token that goes on, then both decoding; both with the same tokens."""
    count = len(token_ids)
    first, second = count * 13 // COMPARED_TOKENS, count * 21 // COMPARED_TOKENS
    long = tuple(range(-(-count // block_size)))
    short = tuple(len(long) + block for block in range(-(-3 // block_size)))
    greedy = SamplingParams(max_tokens=1, temperature=0.0)

    def plan(*chunks: tuple[str, int, int]) -> StepPlan:
        return StepPlan(
            tuple(
                ScheduledChunk(
                    name, tuple(token_ids[start:end]), start, end - start, long if name == "long" else short, greedy
                )
                for name, start, end in chunks
                if start < end <= count
            )
        )

    plans = (
        plan(("long", 0, first), ("short", 0, 1)),
        plan(("short", 1, 2), ("long", first, second)),
        plan(("long", second, second + 1), ("short", 2, 3)),
    )
    return tuple(plan for plan in plans if plan.chunks)
