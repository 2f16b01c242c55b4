"""Typed access to the metadata of a GGUF file: what is missing, or of another kind than it should be, is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvcache.errors import ModelError
from workers.model.gguf_file import MetadataValue

# Beyond the largest model by far, and small enough that no size made from it can hurt.
MAX_INTEGER = 1 << 31


@dataclass(frozen=True, slots=True)
class Metadata:
    """Values by key. Every method raises ModelError when there is neither a value nor a default."""

    path: Path
    values: Mapping[str, MetadataValue]

    def integer(self, key: str, default: int | None = None) -> int:
        """A number from 0 on. A list of equal numbers, as files with one per layer have it, counts as that number."""
        value = self._found(key, default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_INTEGER:
            raise self._wrong(key, "one number from 0 on")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """A number from 1 on."""
        if (value := self.integer(key, default)) < 1:
            raise self._wrong(key, "a positive number")
        return value

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if key in self.values else None

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 of the file as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
        value = self._found(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, "a number")
        return float(str(np.float32(value)))

    def text(self, key: str, default: str | None = None) -> str:
        value = self._found(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._found(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._found(key, None)
        if not isinstance(value, tuple):
            raise self._wrong(key, "a list of texts")
        return value

    def numbers(self, key: str) -> np.ndarray:
        value = self._found(key, None)
        if not isinstance(value, np.ndarray):
            raise self._wrong(key, "a list of numbers")
        return value

    def _found(self, key: str, default: MetadataValue | None) -> MetadataValue:
        value = self.values.get(key, default)
        if value is None:
            raise ModelError(f"{self.path} has no metadata {key}, which its model needs.")
        return value

    def _wrong(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self.path} gives {key} as {str(self.values.get(key))[:60]!r} where {expected} belongs.")
