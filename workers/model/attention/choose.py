"""Which attention backend a GPU gets."""

from __future__ import annotations

from typing import Any

from kvcache.spec import KVCacheSpec

FLASHINFER_DTYPES = ("bfloat16", "float16")
FLASHINFER_HEAD_SIZES = (64, 128, 256)  # those that all of its kernels are built for


def find_flashinfer_misfit(spec: KVCacheSpec, model_dtype: str) -> str | None:
    """Why FlashInfer cannot serve this cache, as far as that can be told without trying; or None."""
    if spec.dtype not in FLASHINFER_DTYPES:
        return f"FlashInfer's KV is {' or '.join(FLASHINFER_DTYPES)}, not {spec.dtype}"
    if model_dtype != spec.dtype:
        return f"with FlashInfer model and KV have one dtype, and these are {model_dtype} and {spec.dtype}"
    if spec.head_size not in FLASHINFER_HEAD_SIZES:
        sizes = ", ".join(str(size) for size in FLASHINFER_HEAD_SIZES)
        return f"FlashInfer's head sizes are {sizes}, and this model's is {spec.head_size}"
    return None


def import_flashinfer() -> Any | None:
    """The ``flashinfer`` module, or None where it is not installed. Importing it takes seconds."""
    try:
        import flashinfer
    except ImportError:
        return None
    return flashinfer
