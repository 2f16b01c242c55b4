"""The builds of the native decoder that this processor can run."""

from __future__ import annotations

import importlib.util

import pytest

from workers.native import library
from workers.native.processor import processor_flags

BUILDS = [
    name
    for name, needed in library.BUILDS
    if needed <= processor_flags() and importlib.util.find_spec(f"workers.native.{name}") is not None
]
needs_build = pytest.mark.skipif(not BUILDS, reason="no native build for this processor")
