"""Processes that our processes started: none may outlive us."""

from __future__ import annotations

import ctypes
import sys

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
GRACE_S = 3.0


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent dies, so that ``end_children`` finds them.

    Linux only; elsewhere orphans go to the init process, as ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """Ends every descendant, gently first, and returns when all are gone."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        _signal(child, kill=False)
    _, alive = psutil.wait_procs(children, timeout=GRACE_S)
    for child in alive:
        _signal(child, kill=True)
    psutil.wait_procs(alive, timeout=GRACE_S)


def _signal(process: psutil.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return  # it was quicker
