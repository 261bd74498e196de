"""Search spaces: candidates as vectors of free coordinates; here those of Bézier curves."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.curve import DEFAULT_BOUNDS, Curve, evaluate

from ..scores import Factors
from .protocol import Candidate, Score
from .settings import UNIFORM_FACTORS

Genome: TypeAlias = NDArray[np.float64]
"""``log y_0 .. log y_n``, then the interior ``x_1 .. x_(n-1)`` (``x_0 = 0``, ``x_n = 1``); shape ``(2 n,)``."""

Start: TypeAlias = tuple[Genome, str]
"""A genome to evaluate and its origin, such as ``"identity"``."""

X_SCALE = 2.0
"""Useful steps of x in units of those of log y."""


_T = np.linspace(0.0, 1.0, 65)  # parameters of the quick look at a curve that `CurveSpace.log_factors` takes


class Space(Protocol):
    """What an algorithm needs to know of its search space."""

    n_layer: int
    bounds: tuple[float, float]
    """Smallest and largest factor."""
    size: int
    """Number of coordinates."""
    box: NDArray[np.float64]
    """Lowest and highest value of each coordinate, shape ``(size, 2)``."""
    scale: NDArray[np.float64]
    """Useful steps of each coordinate in units of those of log factors, shape ``(size,)``."""

    def uniform(self, factor: float) -> Genome:
        """Return the genome that scales all layers alike (position interpolation)."""

    def known_good(
        self, uniform_factors: Sequence[float] = UNIFORM_FACTORS, curves: Sequence[Curve | Factors] = ()
    ) -> list[Start]:
        """Return what a search begins with, each with its origin: identity, uniform scalings in bounds, curves.

        Raises `ValueError`: a curve that no genome is.
        """
        low, high = self.bounds
        first = [(self.uniform(1.0), "identity")]
        first += [(self.uniform(factor), "uniform") for factor in uniform_factors if low <= factor <= high]
        return first + [(self.encode(curve), "seed") for curve in curves]

    def encode(self, curve: Curve | Factors) -> Genome:
        """Return the genome of a curve, or of the factors of all layers. Raises `ValueError`: no genome is that."""

    def smooth(self, generator: np.random.Generator, width: float) -> Genome:
        """Return a random genome near the identity."""

    def repair(self, genomes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return genomes, shape ``(size,)`` or ``(m, size)``, brought back into the space."""

    def express(self, genome: Genome) -> tuple[Curve | None, Factors]:
        """Return the factors of a repaired genome, and the curve that makes them if there is one."""


class CurveSpace(Space):
    """Genomes of curves of ``degree`` whose control points lie in ``bounds``, for ``n_layer`` layers."""

    def __init__(self, n_layer: int, *, degree: int = 3, bounds: tuple[float, float] = DEFAULT_BOUNDS) -> None:
        self.n_layer, self.degree, self.bounds = n_layer, degree, bounds
        self.size = 2 * degree
        self.box = np.array([np.log(bounds)] * (degree + 1) + [[0.0, 1.0]] * (degree - 1))
        """Lowest and highest value of each coordinate, shape ``(size, 2)``."""
        self.scale = np.repeat([1.0, X_SCALE], [degree + 1, degree - 1])

    def uniform(self, factor: float) -> Genome:
        """Return the genome that scales all layers alike (position interpolation)."""
        return np.concatenate([np.full(self.degree + 1, math.log(factor)), np.arange(1, self.degree) / self.degree])

    def bumps(self, factor: float) -> list[Genome]:
        """Return curves that reach ``factor`` in the early, the middle and the late layers, each near 1 elsewhere."""
        t = np.linspace(0.0, 1.0, self.degree + 1)
        bumps = []
        for center in (0.0, 0.5, 1.0):
            shape = np.maximum(0.0, 1.0 - 2.0 * np.abs(t - center))
            highest = float(evaluate(list(shape), _T).max())
            if highest > 0.0:  # a straight line has no middle
                genome = self.uniform(1.0)
                y = 1.0 + (factor - 1.0) * shape / highest  # the curve is linear in y, not in its logarithm
                genome[: self.degree + 1] = np.log(np.maximum(y, self.bounds[0]))
                bumps.append(self.repair(genome))
        return bumps

    def smooth(self, generator: np.random.Generator, width: float) -> Genome:
        """Return a random smooth curve: a level, a slope over the layers, and a little of its own in every point."""
        level, slope, *own = generator.standard_normal(self.degree + 3)
        t = np.linspace(-1.0, 1.0, self.degree + 1)
        genome = self.uniform(1.0)
        genome[: self.degree + 1] = width * (level + slope * t + np.array(own) / 2.0)
        genome[self.degree + 1 :] += width * X_SCALE * generator.standard_normal(self.degree - 1)
        return self.repair(genome)

    def repair(self, genomes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Clip to the bounds, and put interior control points that crossed back in the order of x.

        One genome of shape ``(size,)`` or many of shape ``(m, size)``.
        """
        repaired: NDArray[np.float64] = np.minimum(np.maximum(genomes, self.box[:, 0]), self.box[:, 1])
        y, x = repaired[..., 1 : self.degree], repaired[..., self.degree + 1 :]  # views of the interior points
        order = np.argsort(x, axis=-1, kind="stable")
        y[...], x[...] = np.take_along_axis(y, order, axis=-1), np.take_along_axis(x, order, axis=-1)
        return repaired

    def log_factors(
        self, genomes: Sequence[Genome] | NDArray[np.float64], x: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the logarithms of the curves' factors at positions ``x`` for many genomes, quickly, to about 1e-3.

        Linear between a few points of each curve: the surrogate looks at 300 proposals before every evaluation.

        Args:
            genomes: Repaired genomes, shape ``(m, size)``.
            x: Positions from 0 (first layer) to 1 (last), shape ``(k,)``.

        Returns:
            Shape ``(m, k)``.
        """
        y, inner = np.split(np.asarray(genomes), [self.degree + 1], axis=1)
        ends = np.zeros((len(genomes), 1))
        xs = evaluate(_columns(np.concatenate([ends, inner, ends + 1.0], axis=1)), _T)
        ys = evaluate(_columns(np.exp(y)), _T)
        return np.log([np.interp(x, *row) for row in zip(xs, ys, strict=True)]).reshape(len(genomes), len(x))

    def encode(self, curve: Curve | Factors) -> Genome:
        """Return the genome of ``curve``. Raises `ValueError`: it is no curve, or one of another degree."""
        if not isinstance(curve, Curve):
            raise ValueError("factors of layers in a search of curves")
        x, y = np.array(curve.control_points, dtype=np.float64).T
        if len(x) != self.degree + 1:
            raise ValueError(f"a seed curve of degree {len(x) - 1} in a search of degree {self.degree}")
        return self.repair(np.concatenate([np.log(y), x[1:-1]]))

    def express(self, genome: Genome) -> tuple[Curve | None, Factors]:
        """Return the curve of a repaired genome (`decode`) and its factors."""
        curve = self.decode(genome)
        return curve, rounded(curve.factors(self.n_layer), 9)  # drops float noise: 1 is 1.0

    def decode(self, genome: Genome) -> Curve:
        """Return the curve of a repaired genome, rounded to 1e-4: what is evaluated is what a curve file says."""
        log_y, x = np.split(genome, [self.degree + 1])
        y = [min(max(round(math.exp(v), 4), self.bounds[0]), self.bounds[1]) for v in log_y]
        points = zip([0.0, *(round(float(v), 4) for v in x), 1.0], y, strict=True)
        return Curve(tuple(points), bounds=self.bounds)


def rounded(factors: Iterable[float] | NDArray[np.float64], digits: int) -> Factors:
    """Return factors with so many decimals."""
    return tuple(round(float(factor), digits) for factor in factors)


def _columns(points: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Turn ``(m, degree + 1)`` into a column ``(m, 1)`` a control point, to evaluate at many parameters."""
    return list(points.T[:, :, None])


class Ledger:
    """Issues candidates, finds known ones and remembers scores.

    Ids in the order of asking, no factors twice, scores in the order of ids.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._known: dict[Factors, int] = {}  # candidate id by factors rounded to 1e-3
        self.genomes: list[Genome] = []
        """Of every candidate, by id."""
        self.scores: list[Score] = []
        """Of every candidate told, by id."""
        self.pending: deque[Candidate] = deque()
        """Asked for and not yet told, oldest first."""

    def find(self, genome: Genome) -> int | None:
        """Return the id of the candidate whose factors equal those of a genome to 1e-3; None if there is none."""
        _, factors = self._space.express(self._space.repair(genome))
        return self._known.get(self._key(factors))

    def issue(self, genome: Genome, origin: str) -> Candidate | None:
        """Return the candidate of a genome; None if an earlier one has the same factors to 1e-3."""
        genome = self._space.repair(genome)
        curve, factors = self._space.express(genome)
        if self._known.setdefault(self._key(factors), len(self.genomes)) < len(self.genomes):
            return None
        candidate = Candidate(len(self.genomes), curve, factors, origin)
        self.genomes.append(genome)
        self.pending.append(candidate)
        return candidate

    def settle(self, candidate: Candidate, score: Score) -> None:
        """Note the score of the oldest pending candidate. Raises `ValueError`: it is not the oldest one pending."""
        if not self.pending or self.pending[0] != candidate:
            raise ValueError(f"told of candidate {candidate.id}, but {self._expected()}")
        self.pending.popleft()
        self.scores.append(score)

    def _expected(self) -> str:
        return f"candidate {self.pending[0].id} is next" if self.pending else "none is pending"

    def _key(self, factors: Factors) -> Factors:
        return tuple(round(s, 3) for s in factors)
