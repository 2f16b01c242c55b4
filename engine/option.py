"""What the schema of options says of each beside its type."""

from __future__ import annotations

from typing import Any

from pydantic import Field


def option(
    default: Any, group: str, help_text: str, metavar: str = "N", short: str | None = None, **limits: Any
) -> Any:
    """A field whose flag stands in a ``group`` of the help; ``limits`` are pydantic's."""
    extra: dict[str, Any] = {"group": group, "metavar": metavar, "short": short}
    return Field(default, description=help_text, json_schema_extra=extra, **limits)
