"""A genetic algorithm over Bézier curves of layer factors: ask, evaluate elsewhere, tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.curve import Curve

Genome: TypeAlias = NDArray[np.float64]
Score: TypeAlias = tuple[int, float]
"""``(contexts seen, fitness)``: higher is better, compared as a tuple."""


@dataclass(frozen=True)
class Candidate:
    """One curve to evaluate: ``id`` counts from 0 in the order of asking, ``origin`` tells how it came about."""

    id: int
    curve: Curve
    factors: tuple[float, ...]
    origin: str


def rank(item: tuple[Candidate, Score]) -> tuple[int, float, int]:
    """Sort key that puts the best first and, among equals, the oldest."""
    candidate, (contexts, fitness) = item
    return -contexts, -fitness, candidate.id


class Algorithm(Protocol):
    """What the search needs of an optimizer. All of them maximise."""

    def ask(self, limit: int | None = None) -> list[Candidate]:
        """Return the next generation, at most ``limit`` candidates, none of which was returned before."""
        ...

    def tell(self, results: Iterable[tuple[Candidate, Score]]) -> None:
        """Take the scores of candidates that were asked for; their order does not matter."""
        ...

    def should_stop(self) -> bool:
        """Whether nothing new is to be had."""
        ...


@dataclass(frozen=True)
class _Individual:
    genome: Genome
    width: float  # standard deviation of its mutations
    origin: str


class GeneticAlgorithm:
    """Elitist (mu + lambda) genetic algorithm that maximises; seeded, without input or output.

    Example:
        >>> ga = GeneticAlgorithm(n_layer=4, seed=1)
        >>> for _ in range(5):
        ...     ga.tell([(c, (1, -abs(sum(c.factors) - 4.4))) for c in ga.ask()])
        >>> ga.best[1][1] > -0.05
        True

    A genome is the curve's free coordinates: ``log y_0 .. log y_n`` and the interior ``x_1 .. x_(n-1)``
    (``x_0 = 0`` and ``x_n = 1`` are fixed). Generation 0 holds the identity, uniform scalings (position
    interpolation), the caller's curves, and random smooth curves close to 1. A child has two parents, each
    the better of two drawn (binary tournament); BLX-alpha blend crossover (Eshelman and Schaffer 1993) and
    Gaussian mutation follow, whose width is inherited, adapts itself log-normally (Beyer and Schwefel 2002,
    "Evolution strategies") and decays by ``decay`` a birth. The best ``parents`` of parents and children
    survive.

    The defaults are made for 50 to 400 evaluations. LongRoPE (arXiv 2402.13753) and the search for
    layer-specific scaling (arXiv 2503.04355) take a population of 64, 16 mutations and 16 crossovers a
    generation, the top 32 as parents, mutation probability 0.3 and 40 iterations: 1344 evaluations.

    Args:
        n_layer: Number of layers; candidates carry that many factors.
        degree: Degree of the curve.
        bounds: Smallest and largest y of a control point.
        population: Size of generation 0; more if the identity, uniform scalings and curves are more.
        parents: Survivors of a generation (mu).
        offspring: Candidates of every later generation (lambda).
        seed: Seed of the algorithm's own generator.
        uniform_factors: Uniform scalings of generation 0; those out of bounds are left out.
        curves: Further curves of generation 0, of the same degree.
        width: Initial spread of log y and initial width of mutations.
        decay: Factor on the inherited width at every birth.
        crossover: Probability that a child has two parents rather than one.
        max_retries: Children tried in place of one that repeats an earlier candidate (all factors equal to
            1e-3) before the algorithm counts as converged.
    """

    _ALPHA = 0.3  # how far blend crossover reaches beyond the parents
    _X_SCALE = 2.0  # mutations of x in units of the width of log y
    _MIN_WIDTH, _MAX_WIDTH = 0.002, 0.5

    def __init__(
        self,
        n_layer: int,
        *,
        degree: int = 3,
        bounds: tuple[float, float] = (0.5, 4.0),
        population: int = 16,
        parents: int = 4,
        offspring: int = 8,
        seed: int = 0,
        uniform_factors: Sequence[float] = (0.95, 1.05, 1.1, 1.25),
        curves: Sequence[Curve] = (),
        width: float = 0.05,
        decay: float = 0.97,
        crossover: float = 0.7,
        max_retries: int = 50,
    ) -> None:
        """Prepare generation 0."""
        self._n_layer, self._degree, self._bounds = n_layer, degree, bounds
        self._mu, self._lambda = parents, offspring
        self._width, self._decay, self._crossover = width, decay, crossover
        self._tau = 1.0 / math.sqrt(2.0 * (2 * degree))  # learning rate of the width: 1 / sqrt(2 N), N free coordinates
        self._max_retries = max_retries
        self._rng = np.random.default_rng(seed)

        self._asked: dict[int, _Individual] = {}  # by candidate id
        self._seen: set[tuple[float, ...]] = set()  # factors rounded to 1e-3
        self._parents: list[tuple[Candidate, Score]] = []  # best first
        self._converged = False

        uniform = [f for f in uniform_factors if bounds[0] <= f <= bounds[1]]
        self._queue = [self._seed(self._uniform(1.0), "identity")]
        self._queue += [self._seed(self._uniform(f), "uniform") for f in uniform]
        self._queue += [self._seed(self._encode(curve), "seed") for curve in curves]
        self._queue += [self._random() for _ in range(population - len(self._queue))]

    @property
    def best(self) -> tuple[Candidate, Score]:
        """The best candidate told so far; IndexError before any was."""
        return self._parents[0]

    @property
    def parents(self) -> tuple[tuple[Candidate, Score], ...]:
        """The survivors, best first."""
        return tuple(self._parents)

    def should_stop(self) -> bool:
        """Whether fresh candidates ran out: the population has converged."""
        return self._converged

    def ask(self, limit: int | None = None) -> list[Candidate]:
        """Return generation 0, then ``offspring`` children at a time; fewer if limited or converged."""
        size = len(self._queue) or self._lambda
        candidates: list[Candidate] = []
        while len(candidates) < (size if limit is None else min(size, limit)):
            candidate = self._fresh()
            if candidate is None:
                break
            candidates.append(candidate)
        return candidates

    def tell(self, results: Iterable[tuple[Candidate, Score]]) -> None:
        """Let parents and ``results`` compete for survival; the order of ``results`` does not matter.

        Raises:
            ValueError: a candidate that was not asked for.
        """
        results = list(results)
        if any(candidate.id not in self._asked for candidate, _ in results):
            raise ValueError("told of a candidate that was never asked for")
        survivors = sorted([*self._parents, *results], key=rank)
        self._parents = survivors[: self._mu]

    def _fresh(self) -> Candidate | None:
        for _ in range(self._max_retries):
            individual = self._queue.pop(0) if self._queue else self._child() if self._parents else self._random()
            curve = self._decode(individual.genome)
            factors = tuple(round(float(s), 9) for s in curve.factors(self._n_layer))  # drops float noise: 1 is 1.0
            key = tuple(round(s, 3) for s in factors)
            if key not in self._seen:
                self._seen.add(key)
                candidate = Candidate(len(self._asked), curve, factors, individual.origin)
                self._asked[candidate.id] = individual
                return candidate
        self._converged = True
        return None

    def _child(self) -> _Individual:
        mother = self._tournament()
        genome, width, origin = mother.genome, mother.width, "mutation"
        if self._rng.random() < self._crossover:
            father = self._tournament()
            genome, width, origin = self._blend(genome, father.genome), math.sqrt(width * father.width), "crossover"
        width *= self._decay * math.exp(self._tau * self._rng.standard_normal())
        width = min(max(width, self._MIN_WIDTH), self._MAX_WIDTH)
        return _Individual(self._mutate(genome, width), width, origin)

    def _tournament(self) -> _Individual:
        i, j = self._rng.integers(len(self._parents), size=2)
        return self._asked[self._parents[min(i, j)][0].id]

    def _blend(self, a: Genome, b: Genome) -> Genome:
        share = self._rng.uniform(-self._ALPHA, 1.0 + self._ALPHA, size=a.size)
        return a + share * (b - a)

    def _mutate(self, genome: Genome, width: float) -> Genome:
        scale = np.full(genome.size, width)
        scale[self._degree + 1 :] *= self._X_SCALE
        return self._repair(genome + scale * self._rng.standard_normal(genome.size))

    def _repair(self, genome: Genome) -> Genome:
        """Clip to the bounds, and put interior control points that crossed back in the order of x."""
        log_y, x = np.split(genome, [self._degree + 1])
        log_y, x = np.clip(log_y, *np.log(self._bounds)), np.clip(x, 0.0, 1.0)
        order = np.argsort(x, kind="stable")
        log_y[1:-1] = log_y[1:-1][order]
        return np.concatenate([log_y, x[order]])

    def _seed(self, genome: Genome, origin: str) -> _Individual:
        return _Individual(self._repair(genome), self._width, origin)

    def _uniform(self, factor: float) -> Genome:
        return np.concatenate([np.full(self._degree + 1, math.log(factor)), np.arange(1, self._degree) / self._degree])

    def _random(self) -> _Individual:
        """A random smooth curve: a level, a slope over the layers, and a little of its own in every point."""
        level, slope, *own = self._rng.standard_normal(self._degree + 3)
        genome = self._uniform(1.0)
        t = np.linspace(-1.0, 1.0, self._degree + 1)
        genome[: self._degree + 1] = self._width * (level + slope * t + np.array(own) / 2.0)
        genome[self._degree + 1 :] += self._width * self._X_SCALE * self._rng.standard_normal(self._degree - 1)
        return self._seed(genome, "random")

    def _encode(self, curve: Curve) -> Genome:
        x, y = np.array(curve.control_points, dtype=np.float64).T
        if len(x) != self._degree + 1:
            raise ValueError(f"a seed curve of degree {len(x) - 1} in a search of degree {self._degree}")
        return np.concatenate([np.log(y), x[1:-1]])

    def _decode(self, genome: Genome) -> Curve:
        """Round to 1e-4, so that what is evaluated is what a curve file says."""
        log_y, x = np.split(genome, [self._degree + 1])
        y = [min(max(round(math.exp(v), 4), self._bounds[0]), self._bounds[1]) for v in log_y]
        points = zip([0.0, *(round(float(v), 4) for v in x), 1.0], y, strict=True)
        return Curve(tuple(points), bounds=self._bounds)
