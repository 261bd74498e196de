"""A genetic algorithm over Bézier curves of layer factors: ask, evaluate elsewhere, tell."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from lrope_gguf.curve import Curve

from .algorithm import Candidate, Score, rank
from .space import UNIFORM_FACTORS, CurveSpace, Genome, Ledger


class GeneticAlgorithm:
    """Elitist steady-state (mu + 1) genetic algorithm that maximises; seeded, without input or output.

    Example:
        >>> ga = GeneticAlgorithm(n_layer=4, seed=1)
        >>> for _ in range(48):
        ...     candidate = ga.ask()
        ...     ga.tell(candidate, (1, -abs(sum(candidate.factors) - 4.4)))
        >>> ga.best[1][1] > -0.05
        True

    The first candidates are the identity, uniform scalings (position interpolation), the caller's curves, and
    random smooth curves close to 1. A child has two parents, each the better of two drawn (binary tournament);
    BLX-alpha blend crossover (Eshelman and Schaffer 1993) and Gaussian mutation follow, whose width is inherited,
    adapts itself log-normally (Beyer and Schwefel 2002, "Evolution strategies") and decays by ``decay`` a birth.
    The best ``parents`` of parents and the child survive.

    The defaults are made for 50 to 400 evaluations.

    Args:
        n_layer: Number of layers; candidates carry that many factors.
        degree: Degree of the curve.
        bounds: Smallest and largest y of a control point.
        lag: Candidates that may be asked for before the first of them is told.
        population: Candidates before the first child; more if the identity, uniform scalings and curves are more.
        parents: Survivors (mu).
        seed: Seed of the algorithm's own generator.
        uniform_factors: Uniform scalings to begin with; those out of bounds are left out.
        curves: Further curves to begin with, of the same degree.
        width: Initial spread of log y and initial width of mutations.
        decay: Factor on the inherited width at every birth.
        crossover: Probability that a child has two parents rather than one.
        max_retries: Children tried in place of one that repeats an earlier candidate (all factors equal to
            1e-3) before the algorithm counts as converged.

    Raises:
        ValueError: a seed curve of another degree.
    """

    _ALPHA = 0.3  # how far blend crossover reaches beyond the parents
    _MIN_WIDTH, _MAX_WIDTH = 0.002, 0.5

    def __init__(
        self,
        n_layer: int,
        *,
        degree: int = 3,
        bounds: tuple[float, float] = (0.5, 4.0),
        lag: int = 8,
        population: int = 16,
        parents: int = 4,
        seed: int = 0,
        uniform_factors: Sequence[float] = UNIFORM_FACTORS,
        curves: Sequence[Curve] = (),
        width: float = 0.05,
        decay: float = 0.97,
        crossover: float = 0.7,
        max_retries: int = 50,
    ) -> None:
        """Prepare the first candidates."""
        self.lag = lag
        self._space = CurveSpace(n_layer, degree=degree, bounds=bounds)
        self._ledger = Ledger(self._space)
        self._mu, self._width, self._decay, self._crossover = parents, width, decay, crossover
        self._tau = 1.0 / math.sqrt(2.0 * self._space.size)  # learning rate of the width
        self._max_retries = max_retries
        self._rng = np.random.default_rng(seed)
        self._widths: list[float] = []  # of every candidate's mutations, by id
        self._parents: list[tuple[Candidate, Score]] = []  # best first
        self._converged = False

        self._queue = deque(self._space.known_good(uniform_factors, curves))
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

    def ask(self) -> Candidate | None:
        """Return the next of the first candidates, then children; None if ``lag`` are pending or at the end."""
        if self._converged or len(self._ledger.pending) >= self.lag:
            return None
        for _ in range(self._max_retries):
            genome, width, origin = self._next()
            candidate = self._ledger.issue(genome, origin)
            if candidate is not None:
                self._widths.append(width)
                return candidate
        self._converged = True
        return None

    def tell(self, candidate: Candidate, score: Score) -> None:
        """Let the parents and ``candidate`` compete for survival.

        Raises:
            ValueError: it is not the oldest candidate that was asked for and not told.
        """
        self._ledger.settle(candidate, score)
        self._parents = sorted([*self._parents, (candidate, score)], key=rank)[: self._mu]

    def _next(self) -> tuple[Genome, float, str]:
        if self._queue or not self._parents:
            genome, origin = self._queue.popleft() if self._queue else self._random()
            return genome, self._width, origin
        return self._child()

    def _child(self) -> tuple[Genome, float, str]:
        mother = self._tournament()
        genome, width, origin = self._ledger.genomes[mother], self._widths[mother], "mutation"
        if self._rng.random() < self._crossover:
            father = self._tournament()
            genome, origin = self._blend(genome, self._ledger.genomes[father]), "crossover"
            width = math.sqrt(width * self._widths[father])
        width *= self._decay * math.exp(self._tau * self._rng.standard_normal())
        width = min(max(width, self._MIN_WIDTH), self._MAX_WIDTH)
        return genome + width * self._space.scale * self._rng.standard_normal(genome.size), width, origin

    def _tournament(self) -> int:
        i, j = map(int, self._rng.integers(len(self._parents), size=2))
        return self._parents[min(i, j)][0].id

    def _blend(self, a: Genome, b: Genome) -> Genome:
        share = self._rng.uniform(-self._ALPHA, 1.0 + self._ALPHA, size=a.size)
        return a + share * (b - a)

    def _random(self) -> tuple[Genome, str]:
        return self._space.smooth(self._rng, self._width), "random"
