"""Where there is no terminal, loading is told in few lines."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from engine.start_progress import StartProgress, start_progress


def test_elsewhere_there_is_one_line_per_ten_percent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = StartProgress(on_terminal=False)
    for step in range(101):
        progress.load(step / 100)
        progress.load(step / 100)
    assert caplog.messages == [f"Loading weights: {percent} %" for percent in range(10, 101, 10)]


def test_a_jump_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = StartProgress(on_terminal=False)
    for part in (0.0, 0.55, 1.0):
        progress.load(part)
    assert caplog.messages == ["Loading weights: 50 %", "Loading weights: 100 %"]


def test_on_a_terminal_the_bar_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with start_progress() as progress:
        progress.stage("Loading weights")
        progress.load(0.5)
    shown = terminal.getvalue()
    assert "Loading weights:  50%" in shown
    assert shown.rsplit("\r", 2)[1].strip() == ""  # the last thing written is a blank line
