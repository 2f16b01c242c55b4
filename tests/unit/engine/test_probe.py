"""`twinpool probe`: the roofline's points, the table, the picture, and what is refused."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from engine import probe_view
from engine.cli import main
from engine.device_profiles import load_profile
from engine.probe_view import profile_table
from engine.roofline import DECODE_CONTEXT, Roof, decode_points, draw, prefill_points, roof_gflop_s
from kvcache.errors import ConfigError
from scheduler.types import DeviceProfile, GemmRate
from tests.unit.engine.test_startup import CHECKPOINT
from tests.unit.scheduler.test_cost_model import SHAPE

DEVICE = DeviceProfile("ours", 1000.0, 100.0, 8 << 30, 4, gemm_rates=(GemmRate(1, 90.0), GemmRate(64, 1000.0)))


def test_the_roof_is_the_lower_of_memory_and_arithmetic() -> None:
    assert [roof_gflop_s(DEVICE, intensity) for intensity in (1, 10, 100)] == [100, 1000, 1000]


@pytest.mark.parametrize("name", ["h100-sxm", "a100-sxm", "l40s"])
def test_a_long_prompt_is_bound_by_arithmetic_and_a_small_batch_by_memory(name: str) -> None:
    roof = Roof(load_profile(name), SHAPE)
    slowest = roof.device.prompt_attention_gflop_s
    assert slowest < prefill_points(roof)[-1].gflop_s < roof.device.gemm_gflop_s
    alone = decode_points(roof)[0]
    layers_s = SHAPE.num_layers * roof.device.layer_s
    flops = SHAPE.linear_flops + SHAPE.head_flops + DECODE_CONTEXT * SHAPE.attention_flops
    kernels_s = flops / (alone.gflop_s * 1e9) - layers_s
    assert flops / kernels_s / 1e9 == pytest.approx(alone.intensity * roof.device.read_gb_s, rel=0.02)
    assert alone.gflop_s < roof.device.gemm_gflop_s / 50


def test_a_decode_points_bytes_are_the_weights_and_every_context() -> None:
    for point in decode_points(Roof(DEVICE, SHAPE)):
        num_bytes = SHAPE.weight_bytes + SHAPE.head_bytes + point.size * DECODE_CONTEXT * SHAPE.kv_token_bytes
        flops = point.size * (SHAPE.linear_flops + SHAPE.head_flops + DECODE_CONTEXT * SHAPE.attention_flops)
        assert point.intensity == pytest.approx(flops / num_bytes)


def test_the_table_has_a_column_for_each_device_and_dashes_for_what_is_unknown() -> None:
    output = io.StringIO()
    Console(file=output, width=120).print(profile_table([DEVICE, load_profile("h100-sxm")]))
    lines = {line.strip().split("  ")[0]: line for line in output.getvalue().splitlines()}
    assert "ours" in output.getvalue() and "H100-SXM5-80GB" in output.getvalue()
    assert "2.95" in lines["price per hour"] and "-" in lines["price per hour"]
    assert "1,000" in lines["linear layers, GFLOP/s"] and "791,200" in lines["linear layers, GFLOP/s"]


def test_a_picture_names_each_device(tmp_path: Path) -> None:
    file = tmp_path / "roofline.svg"
    draw([Roof(DEVICE, SHAPE, (("int8", 2000.0),)), Roof(load_profile("h100-sxm"), SHAPE)], file, "tiny")
    assert file.read_bytes().startswith(b"<?xml") and file.stat().st_size > 10_000


def test_a_picture_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output .* cannot be written"):
        draw([Roof(DEVICE, SHAPE)], tmp_path / "missing" / "roofline.svg", "tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-profile", "h1000"], "--device-profile is 'h1000'"),
        (["--output", "roof.gif"], "a picture's name ends in .svg or .png"),
        (["--threads", "none"], "'none' is no number of threads from 1 to 1024"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(probe_view, "_measure")
    try:
        status = main(["probe", *arguments])
    except SystemExit as ended:
        status = int(str(ended.code))
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1


def test_what_is_printed_of_one_device_is_a_profile_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_view, "prepare_checkpoint", Path)
    monkeypatch.setattr(probe_view, "describe_checkpoint", lambda path, dtype: replace(CHECKPOINT, path=path))
    monkeypatch.setattr(probe_view, "_measure", lambda _subject, _options: (DEVICE, ()))
    assert main(["probe", "--json"]) == 0
    file = tmp_path / "ours.json"
    file.write_text(capsys.readouterr().out)
    assert load_profile(str(file)).gemm_rates == DEVICE.gemm_rates
    assert main(["probe", "--json", "--device-profile", "l4"]) == 0
    assert [device["name"] for device in orjson.loads(capsys.readouterr().out)] == ["ours", "L4-24GB"]
