"""On what the workers of this machine compute."""

from __future__ import annotations

from typing import Literal

from kvcache.errors import ResourceError

Device = Literal["cpu", "cuda"]


def choose_device(requested: Literal["auto", "cpu", "cuda"]) -> Device:
    """``auto`` is a GPU where torch can use one.

    Raises:
        ResourceError: ``cuda`` was asked for and is not there.
    """
    if requested == "cpu":
        return "cpu"
    import torch  # not when the module is imported: the command's other uses do without it

    if torch.cuda.is_available():
        return "cuda"
    if requested == "cuda":
        reason = "finds no GPU" if torch.version.cuda else "was built without CUDA"
        raise ResourceError(f"--device is cuda and there is none: torch {torch.__version__} {reason}.")
    return "cpu"


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
