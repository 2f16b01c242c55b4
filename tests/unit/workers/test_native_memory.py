"""Where memory ends, a step of the native decoder ends with an error, and not the process."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from pathlib import Path

import pytest

from kvcache.errors import ResourceError
from kvcache.storage import PagedStorage
from tests.unit.workers.native_models import CONFIGS, SEQUENCE_LENGTH, make_model, spec_of, steps
from workers.model.fused_decoder import FusedDecoder, WeightFormat

STATM = Path("/proc/self/statm")
M_MMAP_THRESHOLD = -3  # of mallopt()
PIECE = 32 << 10  # less than the memory that a thread's attention takes
MOST = 64 << 20  # more than the whole step takes


def use_up_free_memory() -> None:
    """What the allocator holds free, in pieces that matter here."""
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.mallopt(M_MMAP_THRESHOLD, PIECE)
    limit_memory(0)
    size = MOST
    while size >= PIECE:
        if libc.malloc(size) is None:
            size //= 2


def limit_memory(num_bytes: int) -> None:
    """Beyond what this process has now."""
    has = int(STATM.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + num_bytes, resource.RLIM_INFINITY))


def is_enough(num_bytes: int, decoder: FusedDecoder, storage: PagedStorage) -> bool:
    limit_memory(num_bytes)
    try:
        decoder.logits(steps(storage.spec.block_size)[0], storage)
    except ResourceError:
        return False
    return True


def least_memory(decoders: list[FusedDecoder], storage: PagedStorage) -> int:
    """For a first step, to a piece: so it is tried with a little less than the last thing that is allocated takes."""
    use_up_free_memory()
    low, high = 0, MOST
    fresh = iter(decoders)  # all of them keep what they took, or the next would find it free
    assert is_enough(high, next(fresh), storage)
    while high - low > PIECE:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle, next(fresh), storage) else (middle, high)
    return high


@pytest.mark.skipif(not STATM.exists(), reason="no /proc here")
@pytest.mark.parametrize("weight_format", [WeightFormat.FLOAT32, WeightFormat.INT8])
def test_a_step_without_memory_is_refused_wherever_it_ends(
    tmp_path: Path, build: str, weight_format: WeightFormat
) -> None:
    config = CONFIGS["llama"]()
    model, spec = make_model(tmp_path, config), spec_of(config)
    decoders = [FusedDecoder(model, spec, SEQUENCE_LENGTH, 1, weight_format) for _ in range(13)]
    storage = PagedStorage(spec, 60)
    child = os.fork()  # whose memory is limited, and which may end
    if child == 0:
        try:
            os._exit(0 if least_memory(decoders, storage) > 4 * PIECE else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), signal.Signals(os.WTERMSIG(status)).name
    assert os.waitstatus_to_exitcode(status) == 0
