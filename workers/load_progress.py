"""How far a worker is with loading, as it tells the launcher."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """``part`` of the weights is loaded, from 0 to 1, after ``load_seconds``. ``is_ready``: the services listen too."""

    part: float = 0.0
    load_seconds: float = 0.0
    is_ready: bool = False
