"""`twinpool probe`: what this device can do, beside others, as a table, JSON or a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich import box
from rich.console import Console
from rich.table import Table

from engine.device_profiles import load_profile
from engine.machine_limits import usable_cores
from engine.roofline import Roof, draw
from kvcache.errors import ConfigError
from kvcache.spec import KVCacheSpec
from scheduler.types import DeviceProfile, ModelShape
from workers.model.checkpoint import CheckpointInfo, describe_checkpoint, prepare_checkpoint
from workers.model.shape import model_shape

BLOCK_SIZE = 16
NATIVE_FORMATS = (("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("float32", "int4"))
UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """What the command was asked for."""

    model: str
    profiles: tuple[str, ...] = ()  # beside this device
    dtype: str = "auto"
    quantization: str = "none"
    threads: int | None = None
    as_json: bool = False
    output: Path | None = None


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is measured: the steps of one model, computed in one way."""

    checkpoint: CheckpointInfo
    spec: KVCacheSpec
    quantization: str

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.checkpoint, self.spec, self.quantization)


def show_probe(options: ProbeOptions) -> None:
    """Measures this device, and prints it beside the given profiles.

    Raises:
        ConfigError: a profile or option is wrong.
        ModelError: the model, whose steps are measured, cannot be read.
    """
    given = tuple(load_profile(profile) for profile in options.profiles)
    if options.output is not None and options.output.suffix not in (".svg", ".png"):
        raise ConfigError(f"--output is {str(options.output)!r}: a picture's name ends in .svg or .png.")
    checkpoint = describe_checkpoint(prepare_checkpoint(options.model), dtype=options.dtype)
    subject = _Subject(checkpoint, _spec_of(checkpoint), options.quantization)
    own, compute_roofs = _measure(subject, options)
    profiles = (own, *given)
    if options.output is not None:
        others = [Roof(device, subject.shape) for device in given]
        draw([Roof(own, subject.shape, compute_roofs), *others], options.output, options.model)
    if options.as_json:
        written = own if not given else profiles
        sys.stdout.write(orjson.dumps(written, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        Console().print(profile_table(profiles))


def _spec_of(checkpoint: CheckpointInfo) -> KVCacheSpec:
    sizes = (checkpoint.num_layers, checkpoint.num_kv_heads, checkpoint.head_size)
    return KVCacheSpec(*sizes, BLOCK_SIZE, checkpoint.dtype)


def _measure(subject: _Subject, options: ProbeOptions) -> tuple[DeviceProfile, tuple[tuple[str, float], ...]]:
    """This device, and its rate of large products in each format that is not the model's own."""
    import torch  # seconds, which a wrong flag need not wait for

    from workers.device import choose_device
    from workers.model.fused_decoder import CACHE_FORMATS, HEAD_SIZE_MULTIPLE
    from workers.native.library import load_library
    from workers.probe import QUICK, THOROUGH, ProbedModel, probe_device

    device = choose_device("auto")
    spec = subject.spec
    fits = spec.dtype in CACHE_FORMATS and spec.head_size % HEAD_SIZE_MULTIPLE == 0
    is_native = device == "cpu" and fits and load_library() is not None
    if options.threads is not None and device != "cpu":
        raise ConfigError("--threads is for CPUs, and a GPU would be measured.")
    if options.quantization != "none" and not is_native:
        raise ConfigError(f"--quantization {options.quantization} needs a CPU and a model for the native decoder.")
    if device == "cpu":
        torch.set_num_threads(options.threads or usable_cores())
    num_heads = subject.checkpoint.num_attention_heads if is_native else None
    own_format = (subject.checkpoint.dtype, subject.quantization)
    own = probe_device(ProbedModel(*own_format, subject.spec, num_heads), device, THOROUGH)
    if options.output is None or not is_native:
        return own, ()
    roofs = []
    for dtype, quantization in NATIVE_FORMATS:
        if (dtype, quantization) != own_format:
            rate = probe_device(ProbedModel(dtype, quantization, subject.spec, num_heads), device, QUICK).gemm_gflop_s
            roofs.append((dtype if quantization == "none" else quantization, rate))
    return own, tuple(roofs)


def profile_table(profiles: Sequence[DeviceProfile]) -> Table:
    """A column for each device, a row for each rate."""
    table = Table(box=box.SIMPLE)
    table.add_column("")
    for device in profiles:
        table.add_column(device.name, justify="right")
    for title, values in _rows(profiles):
        table.add_row(title, *values)
    for rows in sorted({rate.rows for device in profiles for rate in device.gemm_rates}):
        rates = [{rate.rows: rate.gflop_s for rate in device.gemm_rates}.get(rows, 0.0) for device in profiles]
        table.add_row(f"  {rows} rows", *(_number(rate) for rate in rates))
    return table


def _rows(profiles: Sequence[DeviceProfile]) -> list[tuple[str, list[str]]]:
    return [
        ("threads", [str(device.num_threads) for device in profiles]),
        ("memory, GiB", [_number(device.memory_bytes / (1 << 30)) for device in profiles]),
        ("price per hour", [_number(device.price_per_hour, 2) for device in profiles]),
        ("read, GB/s", [_number(device.read_gb_s, 1) for device in profiles]),
        ("decode attention, GB/s", [_number(device.attention_gb_s, 1) for device in profiles]),
        ("prompt attention, GFLOP/s", [_number(device.prompt_attention_gflop_s) for device in profiles]),
        ("a layer's kernels, us", [_number(1e6 * device.layer_s) for device in profiles]),
        ("link, GB/s", [_number(device.link_gb_s, 1) for device in profiles]),
        ("linear layers, GFLOP/s", [_number(device.gemm_gflop_s) for device in profiles]),
    ]


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if value else UNKNOWN
