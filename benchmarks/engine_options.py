"""The flags of ``python -m benchmarks.engine``, parsed and checked into one frozen object."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.command_line import Parser, check_json, check_threads
from benchmarks.engine_work import AUTO, DECODE_STEPS, MAX_BATCHED_TOKENS, QUANTIZED, STEP_MODELS, WARM_UP_STEPS
from kvcache.errors import ConfigError
from kvcache.spec import CACHE_DTYPES, DTYPE_BYTES
from workers.model.checkpoint import DEFAULT_MODEL, CheckpointInfo

DEFAULT_ALIAS = "default"
LONG_CONTEXT = 1024
PYTHON_BATCH = 32


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """Sequences that decode together, and the prompt tokens that each of them has."""

    batch: int
    context: int
    is_sampled: bool = False  # with top_p; else greedy

    @property
    def name(self) -> str:
        return f"decode {self.batch}, context {self.context}{', top_p' if self.is_sampled else ''}"

    @property
    def longest(self) -> int:
        """Tokens of a sequence at its end."""
        return self.context + 1 + WARM_UP_STEPS + DECODE_STEPS

    @property
    def mean_attended(self) -> float:
        """Tokens that a sequence attends to in a timed step, the new one among them, on average."""
        return self.context + WARM_UP_STEPS + (DECODE_STEPS + 1) / 2


@dataclass(frozen=True, slots=True)
class Options:
    """Flags that fit together. Lengths in tokens; each length and batch once, in the order given."""

    model: str
    dtype: str
    kv_cache_dtype: str
    num_threads: int
    step_model: str
    runs: int
    prefill_tokens: tuple[int, ...]
    batches: tuple[int, ...]
    context: int
    json_path: Path | None
    profile: bool

    @property
    def loaded_dtype(self) -> str:
        """Of the checkpoint; quantized weights are made of float32."""
        return "float32" if self.dtype in QUANTIZED else self.dtype

    @property
    def decode_cases(self) -> tuple[DecodeCase, ...]:
        contexts = dict.fromkeys((self.context, LONG_CONTEXT))
        greedy = tuple(DecodeCase(batch, context) for context in contexts for batch in self.batches)
        return (*greedy, self.sampled_case) if self.sampled_case is not None else greedy

    @property
    def python_case(self) -> DecodeCase | None:
        """The steps of which the share outside of the model is told; None: not among the batches."""
        return DecodeCase(PYTHON_BATCH, self.context) if PYTHON_BATCH in self.batches else None

    @property
    def sampled_case(self) -> DecodeCase | None:
        """The same with tokens drawn, which costs more than to take the likeliest."""
        return replace(self.python_case, is_sampled=True) if self.python_case is not None else None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parse_options(arguments: Sequence[str]) -> Options:
    """Raises ConfigError, one sentence, for a wrong flag."""
    flags = _build_parser().parse_args(arguments)
    check_threads(flags.threads)
    if max(flags.batches) > MAX_BATCHED_TOKENS:
        raise ConfigError(f"--batches: one step takes at most {MAX_BATCHED_TOKENS} sequences, not {max(flags.batches)}")
    if flags.dtype in QUANTIZED and flags.step_model != AUTO:
        raise ConfigError(f"--dtype {flags.dtype} runs natively only, without --step-model")
    check_json(flags.json)
    return Options(
        model=DEFAULT_MODEL if flags.model == DEFAULT_ALIAS else flags.model,
        dtype=flags.dtype,
        kv_cache_dtype=flags.kv_cache_dtype,
        num_threads=flags.threads,
        step_model=flags.step_model,
        runs=flags.runs,
        prefill_tokens=tuple(dict.fromkeys(flags.prefill_tokens)),
        batches=tuple(dict.fromkeys(flags.batches)),
        context=flags.context,
        json_path=flags.json,
        profile=flags.profile,
    )


def check_lengths(options: Options, checkpoint: CheckpointInfo) -> None:
    """Raises ConfigError if a sequence would be longer than the model's context."""
    longest = max(1 + max(options.prefill_tokens), *(case.longest for case in options.decode_cases))
    if longest > checkpoint.max_position_embeddings:
        raise ConfigError(
            f"the longest sequence would have {longest} tokens; the context of this model is"
            f" {checkpoint.max_position_embeddings}"
        )


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.engine",
        description="One worker's step loop without HTTP, gRPC and Ray, beside the limits of the machine.",
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_ALIAS, help="checkpoint folder, hub id, or the default model (%(default)s)")
    add("--threads", type=_count, default=1, metavar="N", help="of the model and of the limits (%(default)s)")
    dtypes = (*DTYPE_BYTES, *QUANTIZED)
    add("--dtype", choices=dtypes, default="float32", help="of the weights (%(default)s)")
    add(
        "--kv-cache-dtype",
        choices=(AUTO, *CACHE_DTYPES),
        default=AUTO,
        help="auto: DTYPE, for int8 and int4 float32 (%(default)s)",
    )
    add("--step-model", choices=STEP_MODELS, default=AUTO, help="auto: what a worker would choose (%(default)s)")
    add("--runs", type=_count, default=5, metavar="N", help="figures are medians of so many (%(default)s)")
    add("--prefill-tokens", type=_count, nargs="+", default=[512, 2048], metavar="N", help="prompts (512 2048)")
    add("--batches", type=_count, nargs="+", default=[1, 8, 32], metavar="N", help="decoding sequences (1 8 32)")
    add("--context", type=_count, default=32, metavar="N", help=f"their prompts; {LONG_CONTEXT} too (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the result here")
    add("--profile", action="store_true", help="also show which parts of a step take how long")
    return parser
