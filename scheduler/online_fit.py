"""A few coefficients that follow what is measured, without ever leaving their bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

MEMORY = 20  # samples that count; older ones fade. A worker gives one to three with a heartbeat
NOISE = 0.1  # how far a sample is expected to be off, as a part of it
OUTLIER = 0.25  # what is further off counts less, in proportion (Huber, 1964)
FADING = 1 - 1 / MEMORY
SWEEPS = 2  # of the solver for each sample; it starts from the last solution


@dataclass(frozen=True, slots=True)
class Coefficient:
    """A number of which something is known beforehand."""

    prior: float
    deviation: float  # how far from it the truth may well be
    low: float  # at least 0
    high: float


class OnlineFit:
    """Fits ``seconds ≈ coefficients · features`` to samples as they come.

    Least squares of the relative error, exponentially weighted, with a Gaussian prior on each coefficient and inside
    a box. The prior keeps what the samples do not tell apart, or do not show, at what was probed, where plain
    recursive least squares with forgetting would let it drift. The box is kept by projected Gauss-Seidel sweeps over
    the normal equations, which end where the least squares inside the box are.
    """

    __slots__ = ("_known", "_matrix", "_vector", "values")

    def __init__(self, coefficients: Sequence[Coefficient]) -> None:
        self._known = [(each.prior, (NOISE / each.deviation) ** 2, each.low, each.high) for each in coefficients]
        self.values = [coefficient.prior for coefficient in coefficients]
        self._matrix = [[0.0] * len(coefficients) for _ in coefficients]
        self._vector = [0.0] * len(coefficients)

    def predict(self, features: Sequence[float]) -> float:
        return sum(map(mul, self.values, features))

    def add(self, features: Sequence[float], seconds: float) -> None:
        """Learns from one sample: ``features`` at least 0 and not all 0, ``seconds`` above 0."""
        predicted = self.predict(features)
        # A far outlier, in either direction, must not outweigh the rest: so the larger of the two is the unit.
        unit = max(seconds, predicted)
        off = abs(seconds - predicted) / unit
        weight = min(1.0, OUTLIER / off) if off else 1.0
        scaled = [feature / unit for feature in features]
        for row, feature in enumerate(scaled):
            share = weight * feature
            self._vector[row] = FADING * self._vector[row] + share * seconds / unit
            self._matrix[row] = [
                FADING * old + share * other for old, other in zip(self._matrix[row], scaled, strict=True)
            ]
        self._solve()

    def _solve(self) -> None:
        values = self.values
        for _ in range(SWEEPS):
            for index, (prior, trust, low, high) in enumerate(self._known):
                line = self._matrix[index]
                rest = self._vector[index] + trust * prior - sum(map(mul, line, values)) + line[index] * values[index]
                best = rest / (line[index] + trust)
                values[index] = low if best < low else min(best, high)
