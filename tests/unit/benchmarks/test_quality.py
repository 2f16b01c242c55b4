"""The quality bench: perplexities against a slow computation, KV handed over, weights that it rounds by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch

from benchmarks import quality
from benchmarks.quality import main, measure, round_in_groups
from kvcache.errors import ConfigError
from kvcache.storage import PagedStorage
from tests.cluster import TinyCheckpoint
from workers.model.fused_decoder import FusedDecoder
from workers.model.transformers_model import load_model
from workers.native.library import load_library

WINDOW = 32
TEXT = "ab cab bac abba cabbage " * 40
native = pytest.mark.skipif(load_library() is None, reason="no native build for this processor")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(quality, "WINDOW", WINDOW)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCheckpoint:
    folder = tmp_path / "tiny"
    folder.mkdir()
    checkpoint = TinyCheckpoint(folder)
    checkpoint.save_tokenizer()
    return checkpoint


def slow_perplexity(tiny: TinyCheckpoint, windows: Sequence[Sequence[int]], first: int = 0) -> float:
    """Of every token of each window after ``first``, given those before it, one at a time."""
    losses = []
    for window in windows:
        for position in range(first + 1, len(window)):
            probabilities = torch.softmax(tiny.logits(window[:position])[-1].double(), dim=-1)
            losses.append(-math.log(float(probabilities[window[position]])))
    return math.exp(sum(losses) / len(losses))


def windows_of(tiny: TinyCheckpoint, count: int) -> list[list[int]]:
    return [list(tiny.prompt(WINDOW, seed)) for seed in range(count)]


@native
def test_perplexity_is_that_of_each_token_after_those_before_it(tiny: TinyCheckpoint) -> None:
    decoder = FusedDecoder(load_model(tiny.path, "float32"), tiny.spec, WINDOW, 1)
    windows = windows_of(tiny, 2)
    perplexity, likeliest = quality._perplexity(decoder, tiny.spec, windows, "label")
    assert perplexity == pytest.approx(slow_perplexity(tiny, windows), rel=1e-4)
    assert likeliest.tolist() == [row for window in windows for row in tiny.logits(window[:-1]).argmax(-1).tolist()]


@native
def test_after_a_handoff_the_second_half_alone_counts(tiny: TinyCheckpoint) -> None:
    decoder = FusedDecoder(load_model(tiny.path, "float32"), tiny.spec, WINDOW, 1)
    windows = windows_of(tiny, 2)
    exact, likeliest = quality._perplexity_after_handoff(decoder, tiny.spec, windows, "float32")
    assert exact == pytest.approx(slow_perplexity(tiny, windows, WINDOW // 2), rel=1e-4)
    assert len(likeliest) == 2 * (WINDOW // 2 - 1)
    rounded, _ = quality._perplexity_after_handoff(decoder, tiny.spec, windows, "fp8")
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.2)


def test_blocks_that_were_handed_over_are_rounded_and_no_others(tiny: TinyCheckpoint) -> None:
    spec = replace(tiny.spec, num_layers=2)
    storage = PagedStorage(spec, 4)
    generator = torch.Generator().manual_seed(5)
    for layer in storage.layers:
        layer.copy_(torch.randn(layer.shape, generator=generator))
    before = [layer.clone() for layer in storage.layers]
    quality._hand_over(storage, [2, 0], "int8")
    for exact, layer in zip(before, storage.layers, strict=True):
        assert torch.equal(layer[[1, 3]], exact[[1, 3]])
        scales = exact.abs().amax(-1, keepdim=True) / 127  # one per token and head
        expected = (exact / scales).round() * scales
        torch.testing.assert_close(layer[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
        assert not torch.equal(layer[[0, 2]], exact[[0, 2]])


@native
def test_the_json_says_what_was_measured_when_and_with_what(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    text, written = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text(TEXT, encoding="utf-8")
    words = ["--model", str(tiny.path), "--tokens", str(2 * WINDOW + 5), "--text", str(text), "--json", str(written)]
    assert main(words) == 0
    result = json.loads(written.read_bytes())
    token_ids = tiny.tokenizer.encode(TEXT)
    windows = [list(token_ids[:WINDOW]), list(token_ids[WINDOW : 2 * WINDOW])]
    first = result["float32/float32"]
    assert first["perplexity"] == pytest.approx(slow_perplexity(tiny, windows), rel=1e-4)
    assert (first["perplexity_over_float32"], first["greedy_agreement"]) == (1.0, 1.0)
    sent = result["sent as float32"]["perplexity"]
    assert sent == pytest.approx(slow_perplexity(tiny, windows, WINDOW // 2), rel=1e-4)
    int8 = result["int8/float32"]
    assert int8["perplexity_over_float32"] == pytest.approx(int8["perplexity"] / first["perplexity"])
    assert datetime.fromisoformat(result["date"]).tzinfo is not None
    assert result["versions"]["torch"] == torch.__version__
    assert (result["tokens"], result["window"]) == (2 * WINDOW + 5, WINDOW)


@native
def test_a_text_shorter_than_a_window_is_refused(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"a window has {WINDOW}"):
        measure(str(tiny.path), 100, tmp_path / "text.txt")


def test_groups_begin_earlier_and_have_sixteen_steps_each() -> None:
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(5)) + 4.0
    rounded = round_in_groups(weight, 16)
    for row, exact in zip(rounded, weight, strict=True):
        for first, last in ((0, 16), (16, 48), (48, 80), (80, 100)):
            group = exact[first:last]
            step = (group.max() - group.min()) / 15
            assert len(row[first:last].unique()) <= 16
            # Half a step, and what bfloat16 makes of the minimum and of 15 steps.
            allowed = step / 2 + (group.min() + 15 * step) / 256
            assert (row[first:last] - group).abs().max() <= allowed
    assert not torch.equal(rounded, round_in_groups(weight, 0))
