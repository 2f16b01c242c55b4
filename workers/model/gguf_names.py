"""Which files hold a model in GGUF, by their names alone. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

from kvcache.errors import ModelError

SUFFIX = ".gguf"
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def find_gguf(folder: Path) -> Path | None:
    """The one model in GGUF that lies in ``folder``, the first part of one that is split, or None.

    Raises:
        ModelError: there are several.
    """
    models = [file for file in sorted(folder.glob(f"*{SUFFIX}")) if _is_first(file)]
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise ModelError(f"{folder} holds several models in GGUF ({names}): give one of these files.")
    return models[0] if models else None


def _is_first(file: Path) -> bool:
    match = SPLIT_NAME.fullmatch(file.name)
    return match is None or int(match["number"]) == 1
