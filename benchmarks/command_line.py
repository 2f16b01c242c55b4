"""What the commands of this folder share: how a wrong flag is told, and how a run ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import orjson

from benchmarks.machine import describe_machine
from kvcache.errors import ConfigError, TwinpoolError


class Parser(argparse.ArgumentParser):
    """Raises instead of printing the whole usage and leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def exit_status(run: Callable[[], int]) -> int:
    """What ``run`` returns; 1 when it cannot go on, 2 for a wrong flag, 130 when interrupted, with one sentence."""
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted; nothing was measured", file=sys.stderr)
        return 130
    except (TwinpoolError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def check_json(path: Path | None) -> None:
    """Raises ConfigError when ``write_json`` could not write there: known before anything is measured."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--json: there is no folder {path.parent}")
    if path is not None and path.is_dir():
        raise ConfigError(f"--json: {path} is a folder")


def check_threads(num_threads: int) -> None:
    """Raises ConfigError when this process has fewer cores."""
    usable_cores = int(describe_machine()["usable_cores"])
    if num_threads > usable_cores:
        raise ConfigError(f"--threads {num_threads}: this process may use {usable_cores} cores")


def write_json(path: Path | None, result: object) -> None:
    """Writes a result where ``--json`` asked for it."""
    if path is not None:
        path.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
