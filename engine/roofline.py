"""The roofline of devices and where a model's steps lie on it (Williams et al., CACM 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcache.errors import ConfigError
from scheduler.cost_model import decode_times, pair_seconds, prefill_times
from scheduler.types import DeviceProfile, ModelShape

PREFILL_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
DECODE_BATCHES = (1, 4, 16, 64, 256)
DECODE_CONTEXT = 512  # tokens of each sequence
_INTENSITIES = tuple(10 ** (exponent / 20) for exponent in range(-20, 81))  # 0.1 to 10,000 FLOP per byte


@dataclass(frozen=True, slots=True)
class Point:
    """A step of the model on a device."""

    size: int  # prompt tokens, or decoding sequences
    intensity: float  # FLOP per byte of memory read
    gflop_s: float  # predicted


@dataclass(frozen=True, slots=True)
class Roof:
    """One device with the model on it; ``compute_roofs`` are more of its compute rates, by what is multiplied."""

    device: DeviceProfile
    shape: ModelShape
    compute_roofs: tuple[tuple[str, float], ...] = ()  # (dtype, GFLOP/s)


def roof_gflop_s(device: DeviceProfile, intensity: float) -> float:
    return min(device.gemm_gflop_s, intensity * device.read_gb_s)


def prefill_points(roof: Roof) -> list[Point]:
    """One prompt without cached tokens, in one step."""
    device, shape = roof.device, roof.shape
    linear, pair_s = prefill_times(device, shape), pair_seconds(device, shape)
    points = []
    for num_tokens in PREFILL_TOKENS:
        num_pairs = num_tokens * (num_tokens + 1) / 2
        flops = shape.linear_flops * num_tokens + shape.attention_flops * num_pairs
        seconds = linear.seconds(num_tokens) + num_pairs * pair_s
        points.append(Point(num_tokens, flops / shape.weight_bytes, flops / seconds / 1e9))
    return points


def decode_points(roof: Roof) -> list[Point]:
    """One step of sequences with ``DECODE_CONTEXT`` tokens each."""
    device, shape = roof.device, roof.shape
    weight_bytes = shape.weight_bytes + shape.head_bytes
    linear = decode_times(device, shape)
    points = []
    for batch in DECODE_BATCHES:
        kv_bytes = batch * DECODE_CONTEXT * shape.kv_token_bytes
        flops = batch * (shape.linear_flops + shape.head_flops + shape.attention_flops * DECODE_CONTEXT)
        seconds = linear.seconds(batch) + kv_bytes / ((device.attention_gb_s or device.read_gb_s) * 1e9)
        points.append(Point(batch, flops / (weight_bytes + kv_bytes), flops / seconds / 1e9))
    return points


def draw(roofs: Sequence[Roof], file: Path, model: str) -> None:
    """Writes the picture of a model on devices; the file's ending says in which format.

    Raises:
        ConfigError: matplotlib is not installed, or cannot write this format or file.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--output needs matplotlib: install Twinpool with its extra, twinpool[plots].") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.6), layout="constrained")
    for index, roof in enumerate(roofs):
        _draw_roof(axes, roof, f"C{index}", numbered=index in (0, len(roofs) - 1))
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte read from memory", ylabel="GFLOP/s")
    axes.set_xlim(_INTENSITIES[0], _INTENSITIES[-1])
    axes.set_title(
        f"{model}: prefill (○, by prompt tokens) and decode (■, by batch, {DECODE_CONTEXT} tokens each)", fontsize=10
    )
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {file} cannot be written: {error}.") from None
    finally:
        pyplot.close(figure)


def _draw_roof(axes: Any, roof: Roof, color: str, *, numbered: bool) -> None:
    """``numbered``: sizes stand beside the points, which are about the same on every device."""
    device = roof.device
    label = f"{device.name}: {device.gemm_gflop_s:,.0f} GFLOP/s, {device.read_gb_s:,.0f} GB/s"
    axes.plot(_INTENSITIES, [roof_gflop_s(device, each) for each in _INTENSITIES], color=color, label=label)
    for index, (name, gflop_s) in enumerate(roof.compute_roofs):
        ridge = gflop_s / device.read_gb_s
        axes.plot([ridge, _INTENSITIES[-1]], [gflop_s, gflop_s], color=color, linestyle=":", linewidth=1)
        axes.annotate(
            name,
            (_INTENSITIES[-1] / 3, gflop_s),  # between two points
            xytext=(-2, -8 if index % 2 else 2),  # two roofs may be close
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )
    for marker, points, filled in (("o", prefill_points(roof), False), ("s", decode_points(roof), True)):
        axes.plot(
            [point.intensity for point in points],
            [point.gflop_s for point in points],
            marker,
            color=color,
            markersize=5,
            markerfacecolor=color if filled else "white",
        )
        for point in points if numbered else ():
            offset = (5, -9) if filled else (-3, 5)
            axes.annotate(
                str(point.size), (point.intensity, point.gflop_s), xytext=offset, textcoords="offset points", fontsize=6
            )
