"""The space that all algorithms search: Bézier curves of one degree as vectors of free coordinates."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.curve import Curve

from .algorithm import Candidate, Score

Genome: TypeAlias = NDArray[np.float64]
"""``log y_0 .. log y_n``, then the interior ``x_1 .. x_(n-1)`` (``x_0 = 0``, ``x_n = 1``); shape ``(2 n,)``."""

X_SCALE = 2.0
"""Useful steps of x in units of those of log y."""


UNIFORM_FACTORS = (0.95, 1.05, 1.1, 1.25)
"""Uniform scalings that every search tries first."""


class CurveSpace:
    """Genomes of curves of ``degree`` whose control points lie in ``bounds``, for ``n_layer`` layers."""

    def __init__(self, n_layer: int, *, degree: int = 3, bounds: tuple[float, float] = (0.5, 4.0)) -> None:
        """Hold the settings."""
        self.n_layer, self.degree, self.bounds = n_layer, degree, bounds
        self.size = 2 * degree
        self.scale = np.repeat([1.0, X_SCALE], [degree + 1, degree - 1])

    @property
    def box(self) -> NDArray[np.float64]:
        """Lowest and highest value of each coordinate, shape ``(size, 2)``."""
        y, x = np.log(self.bounds), np.array([0.0, 1.0])
        return np.concatenate([np.tile(y, (self.degree + 1, 1)), np.tile(x, (self.degree - 1, 1))])

    def uniform(self, factor: float) -> Genome:
        """Return the genome that scales all layers alike (position interpolation)."""
        return np.concatenate([np.full(self.degree + 1, math.log(factor)), np.arange(1, self.degree) / self.degree])

    def known_good(self, uniform_factors: Sequence[float], curves: Sequence[Curve]) -> list[tuple[Genome, str]]:
        """Return what a search begins with, each with its origin: identity, uniform scalings in bounds, curves.

        Raises:
            ValueError: a curve of another degree.
        """
        low, high = self.bounds
        first = [(self.uniform(1.0), "identity")]
        first += [(self.uniform(factor), "uniform") for factor in uniform_factors if low <= factor <= high]
        return first + [(self.encode(curve), "seed") for curve in curves]

    def smooth(self, generator: np.random.Generator, width: float) -> Genome:
        """Return a random smooth curve: a level, a slope over the layers, and a little of its own in every point."""
        level, slope, *own = generator.standard_normal(self.degree + 3)
        t = np.linspace(-1.0, 1.0, self.degree + 1)
        genome = self.uniform(1.0)
        genome[: self.degree + 1] = width * (level + slope * t + np.array(own) / 2.0)
        genome[self.degree + 1 :] += width * X_SCALE * generator.standard_normal(self.degree - 1)
        return self.repair(genome)

    def repair(self, genome: Genome) -> Genome:
        """Clip to the bounds, and put interior control points that crossed back in the order of x."""
        log_y, x = np.split(genome, [self.degree + 1])
        log_y, x = np.clip(log_y, *np.log(self.bounds)), np.clip(x, 0.0, 1.0)
        order = np.argsort(x, kind="stable")
        log_y[1:-1] = log_y[1:-1][order]
        return np.concatenate([log_y, x[order]])

    def encode(self, curve: Curve) -> Genome:
        """Return the genome of ``curve``.

        Raises:
            ValueError: it has another degree.
        """
        x, y = np.array(curve.control_points, dtype=np.float64).T
        if len(x) != self.degree + 1:
            raise ValueError(f"a seed curve of degree {len(x) - 1} in a search of degree {self.degree}")
        return self.repair(np.concatenate([np.log(y), x[1:-1]]))

    def decode(self, genome: Genome) -> Curve:
        """Return the curve of a repaired genome, rounded to 1e-4: what is evaluated is what a curve file says."""
        log_y, x = np.split(genome, [self.degree + 1])
        y = [min(max(round(math.exp(v), 4), self.bounds[0]), self.bounds[1]) for v in log_y]
        points = zip([0.0, *(round(float(v), 4) for v in x), 1.0], y, strict=True)
        return Curve(tuple(points), bounds=self.bounds)


class Ledger:
    """Who was asked for and told: ids in the order of asking, no factors twice, scores in the order of ids."""

    def __init__(self, space: CurveSpace) -> None:
        """Begin with nothing."""
        self._space = space
        self._known: dict[tuple[float, ...], int] = {}  # candidate id by factors rounded to 1e-3
        self.genomes: list[Genome] = []
        """Of every candidate, by id."""
        self.scores: list[Score] = []
        """Of every candidate told, by id."""
        self.pending: deque[Candidate] = deque()
        """Asked for and not yet told, oldest first."""

    def find(self, genome: Genome) -> int | None:
        """Return the id of the candidate whose factors equal those of a genome to 1e-3; None if there is none."""
        return self._known.get(self._key(self._factors(self._space.decode(self._space.repair(genome)))))

    def issue(self, genome: Genome, origin: str) -> Candidate | None:
        """Return the candidate of a genome; None if an earlier one has the same factors to 1e-3."""
        genome = self._space.repair(genome)
        curve = self._space.decode(genome)
        factors = self._factors(curve)
        if self._known.setdefault(self._key(factors), len(self.genomes)) < len(self.genomes):
            return None
        candidate = Candidate(len(self.genomes), curve, factors, origin)
        self.genomes.append(genome)
        self.pending.append(candidate)
        return candidate

    def settle(self, candidate: Candidate, score: Score) -> None:
        """Note the score of the oldest pending candidate.

        Raises:
            ValueError: it is not the oldest one pending.
        """
        if not self.pending or self.pending[0] != candidate:
            raise ValueError(f"told of candidate {candidate.id}, but {self._expected()}")
        self.pending.popleft()
        self.scores.append(score)

    def _expected(self) -> str:
        return f"candidate {self.pending[0].id} is next" if self.pending else "none is pending"

    def _factors(self, curve: Curve) -> tuple[float, ...]:
        return tuple(round(float(s), 9) for s in curve.factors(self._space.n_layer))  # drops float noise: 1 is 1.0

    def _key(self, factors: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(round(s, 3) for s in factors)
