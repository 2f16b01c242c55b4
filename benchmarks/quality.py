"""What rounding costs, of weights, of the KV cache and of KV on its way: perplexity and greedy agreement with float32.

``python -m benchmarks.quality [--model MODEL] [--tokens 20992] [--text FILE] [--json FILE]``

The default text is the language reference that comes with Python (``pydoc_data``, PSF licence).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import orjson
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.command_line import check_json
from benchmarks.machine import describe_run
from engine.tokenizer import Tokenizer
from kvcache.errors import ConfigError, TwinpoolError
from kvcache.rows import decode_rows
from kvcache.spec import KVCacheSpec
from kvcache.storage import ROW_DTYPES, PagedStorage
from kvcache.transfer.compress import RoundedReads
from scheduler.step_plan import ScheduledChunk, StepPlan
from workers.model.attention_layers import read_attention_layers
from workers.model.checkpoint import DEFAULT_MODEL, describe_checkpoint, prepare_checkpoint
from workers.model.fused_decoder import FusedDecoder, WeightFormat, find_misfit
from workers.model.transformers_model import load_model

WINDOW = 512
BLOCK_SIZE = 16
# Weights and KV; float32 first. What a dtype of the model costs, then what the KV's adds.
CASES = (
    (WeightFormat.FLOAT32, "float32"),
    (WeightFormat.BFLOAT16, "bfloat16"),
    (WeightFormat.INT8, "float32"),
    (WeightFormat.INT4, "float32"),
    (WeightFormat.FLOAT32, "int8"),
    (WeightFormat.FLOAT32, "fp8"),
    (WeightFormat.BFLOAT16, "int8"),
    (WeightFormat.INT8, "int8"),
)
# int4 keeps the groups that the default checkpoint was rounded in; what it costs where they are others is measured too.
REGROUPED = "int4 in other groups/float32"
GROUP = 32  # see workers/native/packed.h
# KV on its way, as ``--kv-transfer-dtype``: the first half of each window is handed over, the second is measured.
SENT_AS = ("float32", "int8", "fp8")


@dataclass(frozen=True, slots=True)
class Quality:
    perplexity: float
    perplexity_over_float32: float
    greedy_agreement: float  # share of positions whose likeliest token is float32's


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=41 * WINDOW, help=f"at least {WINDOW} (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="a UTF-8 file instead of the default text")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        check_json(options.json)
        result = measure(options.model, options.tokens, options.text)
    except (TwinpoolError, OSError) as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 1
    _show(result)
    if options.json:
        report: dict[str, object] = {"model": options.model, "tokens": options.tokens, "window": WINDOW}
        report |= {name: asdict(quality) for name, quality in result.items()}
        report |= {**describe_run("torch", "transformers")}
        options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    return 0


def measure(model: str, num_tokens: int, text: Path | None) -> dict[str, Quality]:
    """Every case on the same windows of the text, float32 first; by "weights/KV".

    Raises:
        ConfigError: the text is too short, or the model does not run natively.
    """
    folder = prepare_checkpoint(model)
    info = describe_checkpoint(folder, dtype="float32", device="cpu")
    words = text.read_text(encoding="utf-8") if text else "\n\n".join(topics[name] for name in sorted(topics))
    token_ids = Tokenizer.from_checkpoint(folder).encode(words)[:num_tokens]
    windows = [token_ids[at : at + WINDOW] for at in range(0, len(token_ids) - WINDOW + 1, WINDOW)]
    if not windows:
        raise ConfigError(f"The text has {len(token_ids)} tokens; a window has {WINDOW}.")
    loaded = load_model(folder, "float32")
    layers = read_attention_layers(loaded, WINDOW)
    results: dict[str, Quality] = {}
    reference: torch.Tensor | None = None
    for name, weight_format, dtype in _cases():
        spec = KVCacheSpec(info.num_layers, info.num_kv_heads, info.head_size, BLOCK_SIZE, dtype)
        if (misfit := find_misfit(loaded, spec, layers)) is not None:
            raise ConfigError(f"{model} does not run natively: {misfit}.")
        if name == REGROUPED:
            _round_in_other_groups(loaded)
        decoder = FusedDecoder(loaded, spec, WINDOW, 1, weight_format)
        perplexity, likeliest = _perplexity(decoder, spec, windows, name)
        reference = likeliest if reference is None else reference
        first = next(iter(results.values())).perplexity if results else perplexity
        agreement = float((likeliest == reference).float().mean())
        results[name] = Quality(perplexity, perplexity / first, agreement)
        if len(results) == 1:
            sent = _measure_sent(decoder, spec, windows)
    return results | sent


def _cases() -> list[tuple[str, WeightFormat, str]]:
    """Names, formats of weights and dtypes of KV, in order; the last changes the model."""
    cases = [(f"{weight_format.name.lower()}/{dtype}", weight_format, dtype) for weight_format, dtype in CASES]
    return [*cases, (REGROUPED, WeightFormat.FLOAT32, "float32")]


@torch.no_grad()
def _round_in_other_groups(model: Any) -> None:
    """The linear layers as int4 rounds them, with groups that begin half a group earlier; activations stay float32."""
    for linear in model.model.layers.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.weight = torch.nn.Parameter(round_in_groups(linear.weight, GROUP // 2), requires_grad=False)


def round_in_groups(weight: torch.Tensor, shift: int) -> torch.Tensor:
    """To 4 bits with a bfloat16 scale and minimum per group of a row, the first of them ``shift`` values short."""
    width = weight.shape[1]
    padded = torch.nn.functional.pad(weight, (shift, -(width + shift) % GROUP), mode="replicate")
    groups = padded.unflatten(1, (-1, GROUP))
    minimum = groups.amin(-1, keepdim=True).bfloat16().float()
    scale = ((groups.amax(-1, keepdim=True) - minimum) / 15).bfloat16().float()
    values = ((groups - minimum) / scale.clamp_min(1e-30)).round().clamp(0, 15)
    return (values * scale + minimum).flatten(1)[:, shift : shift + width]


def _measure_sent(decoder: FusedDecoder, spec: KVCacheSpec, windows: Sequence[list[int]]) -> dict[str, Quality]:
    """By "sent as dtype"; the first is what the others are compared with."""
    runs = {dtype: _perplexity_after_handoff(decoder, spec, windows, dtype) for dtype in SENT_AS}
    first, reference = runs[SENT_AS[0]]
    return {
        f"sent as {dtype}": Quality(perplexity, perplexity / first, float((likeliest == reference).float().mean()))
        for dtype, (perplexity, likeliest) in runs.items()
    }


def _perplexity_after_handoff(
    decoder: FusedDecoder, spec: KVCacheSpec, windows: Sequence[list[int]], dtype: str
) -> tuple[float, torch.Tensor]:
    """Of the second half of each window, over KV of the first that came in ``dtype``."""
    num_blocks, half = spec.num_blocks_for(WINDOW), WINDOW // 2
    storage = PagedStorage(spec, num_blocks)
    loss, likeliest = 0.0, []
    for window in tqdm(windows, desc=f"sent as {dtype}", disable=not sys.stderr.isatty(), leave=False):
        table = tuple(range(num_blocks))
        prompt = ScheduledChunk("window", tuple(window[:half]), 0, half, table, None)
        decoder.logits_of_rows(StepPlan((prompt,)), storage, [])
        if dtype != spec.dtype:
            _hand_over(storage, table[: spec.num_blocks_for(half)], dtype)
        rest = ScheduledChunk("window", tuple(window[half:]), half, WINDOW - half, table, None)
        logits = decoder.logits_of_rows(StepPlan((rest,)), storage, list(range(WINDOW - half - 1)))
        targets = torch.tensor(window[half + 1 :]).unsqueeze(1)
        loss -= float(torch.log_softmax(logits, dim=-1).gather(1, targets).sum())
        likeliest.append(logits.argmax(dim=-1))
    return math.exp(loss / (len(windows) * (WINDOW - half - 1))), torch.cat(likeliest)


def _hand_over(storage: PagedStorage, block_ids: Sequence[int], dtype: str) -> None:
    """The blocks become what a receiver would make of them."""
    reads = RoundedReads(storage, dtype)
    for layer in range(storage.spec.num_layers):
        rows = torch.frombuffer(reads.read_blocks(layer, block_ids), dtype=torch.uint8)
        rows = rows.view(-1, reads.spec.row_bytes).view(ROW_DTYPES[dtype])
        numbers = decode_rows(rows, ROW_DTYPES[storage.spec.dtype]).view(torch.uint8).flatten()
        storage.write_blocks(layer, block_ids, memoryview(numbers.numpy().data))


def _perplexity(
    decoder: FusedDecoder, spec: KVCacheSpec, windows: Sequence[list[int]], label: str
) -> tuple[float, torch.Tensor]:
    num_blocks = spec.num_blocks_for(WINDOW)
    storage = PagedStorage(spec, num_blocks)
    loss, likeliest = 0.0, []
    for window in tqdm(windows, desc=label, disable=not sys.stderr.isatty(), leave=False):
        chunk = ScheduledChunk("window", tuple(window), 0, WINDOW, tuple(range(num_blocks)), None)
        logits = decoder.logits_of_rows(StepPlan((chunk,)), storage, list(range(WINDOW - 1)))
        targets = torch.tensor(window[1:]).unsqueeze(1)
        loss -= float(torch.log_softmax(logits, dim=-1).gather(1, targets).sum())
        likeliest.append(logits.argmax(dim=-1))
    return math.exp(loss / (len(windows) * (WINDOW - 1))), torch.cat(likeliest)


def _show(result: dict[str, Quality]) -> None:
    table = Table("weights/KV", title="perplexity and agreement with float32")
    for column in ("perplexity", "over float32", "greedy agreement"):
        table.add_column(column, justify="right")
    for name, quality in result.items():
        table.add_row(
            name,
            f"{quality.perplexity:.3f}",
            f"{quality.perplexity_over_float32 - 1:+.2%}",
            f"{quality.greedy_agreement:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
