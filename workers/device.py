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


def gpu_of_rank(rank: int) -> str:
    """The GPU on which a rank of a tensor-parallel group computes, as torch calls it.

    Under Ray it is the only one that the rank's process sees, elsewhere that of the rank's number.

    Raises:
        ResourceError: this process does not see so many.
    """
    num_gpus = count_gpus()
    if num_gpus == 1:
        return "cuda:0"
    if rank >= num_gpus:
        raise ResourceError(f"Rank {rank} of a tensor-parallel group needs a GPU of its own; torch sees {num_gpus}.")
    return f"cuda:{rank}"


def use_device(device: str) -> None:
    """Makes it the current one of this thread, as torch calls it; a CPU always is."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
