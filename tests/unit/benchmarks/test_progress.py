"""Progress for people on a terminal and for logs."""

from __future__ import annotations

import io

from benchmarks.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_per_ten_percent() -> None:
    output = io.StringIO()
    progress = Progress(output, total=200)
    for number in range(200):
        progress.advance(failed=number == 0, now_s=number / 10)
    lines = output.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1] == "100 %  200/200 requests, 1 failed, 19.9 s"


def test_a_terminal_gets_a_bar_that_is_not_redrawn_for_every_request() -> None:
    output = Terminal()
    progress = Progress(output, total=1000)
    for number in range(1000):
        progress.advance(failed=number == 0, now_s=number / 100)
    written = output.getvalue()
    assert "1000/1000" in written and "failed=1" in written and written.endswith("\n")
    assert written.count("\r") < 500
