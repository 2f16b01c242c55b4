"""The flags of ``python -m benchmarks.serve``, parsed and checked into one frozen object."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from benchmarks.client import Endpoint
from benchmarks.command_line import Parser, check_json
from benchmarks.measurements import GoodputLimits
from benchmarks.workload import LengthRange
from kvcache.errors import ConfigError

DEFAULT_NUM_PROMPTS = 100


@dataclass(frozen=True, slots=True)
class Options:
    """Flags that fit together. ``model`` None means: ask the server. Times in seconds, lengths in tokens."""

    base_url: str
    model: str | None
    endpoint: Endpoint
    request_rate: float
    trace: Path | None
    trace_scale: float
    burstiness: float
    num_prompts: int | None
    duration_s: float | None
    input_lengths: LengthRange
    output_lengths: LengthRange
    max_input_tokens: int | None
    token_ids: tuple[int, int]
    temperature: float
    ignore_eos: bool
    seed: int
    max_concurrency: int | None
    goodput: GoodputLimits
    api_key: str | None
    timeout_s: float
    json_path: Path | None


Value = TypeVar("Value")


def _flag_type(convert: Callable[[str], Value], fits: Callable[[Value], bool], wanted: str) -> Callable[[str], Value]:
    """An argparse type that says what was wanted, where argparse itself would name a Python function."""

    def parse(text: str) -> Value:
        try:
            value = convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from error
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def _to_id_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    return int(low), int(high)


_rate = _flag_type(float, lambda value: value > 0, "a positive number")
_positive = _flag_type(float, lambda value: 0 < value < math.inf, "a positive, finite number")
_not_negative = _flag_type(float, lambda value: 0 <= value < math.inf, "a number that is zero or more")
_count = _flag_type(int, lambda value: value >= 1, "a positive whole number")
_seed = _flag_type(int, lambda value: value >= 0, "a whole number that is zero or more")
_lengths = _flag_type(LengthRange.parse, lambda _: True, "N or uniform:LO:HI with 1 <= LO <= HI")
_id_range = _flag_type(_to_id_range, lambda ids: 0 <= ids[0] < ids[1], "LO:HI with 0 <= LO < HI")


def parse_options(arguments: Sequence[str]) -> Options:
    """Raises ConfigError, one sentence, for a wrong flag or flags that contradict each other."""
    flags = _build_parser().parse_args(arguments)
    _check_combinations(flags)
    has_limit = flags.num_prompts is not None or flags.duration is not None
    needs_count = flags.trace is None and not has_limit
    return Options(
        base_url=_base_url(flags.base_url),
        model=None if flags.model == "auto" else flags.model,
        endpoint=Endpoint(flags.endpoint),
        request_rate=math.inf if flags.request_rate is None else flags.request_rate,
        trace=flags.trace,
        trace_scale=1.0 if flags.trace_scale is None else flags.trace_scale,
        burstiness=1.0 if flags.burstiness is None else flags.burstiness,
        num_prompts=DEFAULT_NUM_PROMPTS if needs_count else flags.num_prompts,
        duration_s=flags.duration,
        input_lengths=flags.input_tokens or LengthRange(256, 256),
        output_lengths=flags.output_tokens or LengthRange(128, 128),
        max_input_tokens=flags.max_input_tokens,
        token_ids=flags.token_ids,
        temperature=flags.temperature,
        ignore_eos=flags.ignore_eos,
        seed=flags.seed,
        max_concurrency=flags.max_concurrency,
        goodput=_goodput_limits(flags.goodput or ()),
        api_key=flags.api_key,
        timeout_s=flags.timeout,
        json_path=flags.json,
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.serve",
        description="Open-loop load on any OpenAI-compatible server: requests leave on schedule, answered or not.",
    )
    _add_server_flags(parser.add_argument_group("server"))
    _add_arrival_flags(parser.add_argument_group("arrivals"))
    _add_request_flags(parser.add_argument_group("requests"))
    _add_result_flags(parser.add_argument_group("result"))
    return parser


def _add_server_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="server, with or without /v1 (%(default)s)")
    add("--model", default="auto", help="model id; auto: the first that the server lists")
    add("--endpoint", choices=[endpoint.value for endpoint in Endpoint], default="completions")
    add("--api-key", help="sent as bearer token")
    add("--timeout", type=_positive, default=600.0, metavar="S", help="limit for one request in s (%(default)g)")


def _add_arrival_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--request-rate", type=_rate, metavar="R", help="requests/s; inf, the default: all at once")
    add("--burstiness", type=_rate, metavar="B", help="gamma shape of the gaps; 1 is Poisson, below is burstier (1)")
    add("--trace", type=Path, metavar="FILE", help="replay Azure .csv or Mooncake .jsonl, with or without .gz")
    add("--trace-scale", type=_positive, metavar="X", help="replay X times as fast (1)")
    add("--num-prompts", type=_count, metavar="N", help=f"requests ({DEFAULT_NUM_PROMPTS}, or the whole trace)")
    add("--duration", type=_positive, metavar="S", help="send for S seconds, then wait for the answers")
    add(
        "--max-concurrency",
        type=_count,
        metavar="N",
        help="hold requests back while N are under way; no longer an open loop, the delay is reported",
    )


def _add_request_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--input-tokens", type=_lengths, metavar="D", help="prompt length, N or uniform:LO:HI (256)")
    add("--output-tokens", type=_lengths, metavar="D", help="answer length, N or uniform:LO:HI (128)")
    add("--max-input-tokens", type=_count, metavar="N", help="cut longer prompts to N; the number cut is reported")
    add(
        "--token-ids",
        type=_id_range,
        default=(1000, 30000),
        metavar="LO:HI",
        help="draw prompt ids from [LO, HI); the default avoids special tokens of common vocabularies (1000:30000)",
    )
    add("--temperature", type=_not_negative, default=0.0, metavar="T", help="sampling temperature (0)")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for answers of full length; not every server knows the field",
    )
    add("--seed", type=_seed, default=0, help="of arrivals, lengths and prompts (0)")


def _add_result_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--goodput", nargs="+", metavar="NAME:MS", help="limits such as ttft:1500 tpot:120 (also e2el)")
    add("--json", type=Path, metavar="FILE", help="write the result here")


def _check_combinations(flags: argparse.Namespace) -> None:
    with_trace = ("request_rate", "burstiness", "input_tokens", "output_tokens")
    given = [name for name in with_trace if getattr(flags, name) is not None]
    if flags.trace is not None and given:
        raise ConfigError(f"--{given[0].replace('_', '-')} cannot be used with --trace, which decides it")
    if flags.trace is None and flags.trace_scale is not None:
        raise ConfigError("--trace-scale needs --trace")
    rate = math.inf if flags.request_rate is None else flags.request_rate
    if flags.trace is None and flags.duration is not None and math.isinf(rate):
        raise ConfigError("--duration needs --trace or a finite --request-rate")
    check_json(flags.json)


def _base_url(text: str) -> str:
    """Without a closing slash or /v1. User and password are refused: the URL goes into the result."""
    wanted = "--base-url must look like http://127.0.0.1:8000, without user, password or query"
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise ConfigError(f"{wanted}: {error}") from error
    if not usable or parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(wanted)
    return text.rstrip("/").removesuffix("/v1")


def _goodput_limits(pairs: Sequence[str]) -> GoodputLimits:
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        key = f"{name}_ms"
        if name not in ("ttft", "tpot", "e2el") or key in limits:
            raise ConfigError(f"--goodput takes ttft:MS, tpot:MS and e2el:MS, each once, not {pair!r}")
        try:
            limits[key] = _positive(value)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--goodput {pair!r}: {error} of ms") from error
    return GoodputLimits(**limits)
