"""Other optimizers behind the same protocol: what the genetic algorithm must beat, and a choice for users.

All of them begin with the same curves as the genetic algorithm: the identity, uniform scalings, the caller's.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.curve import DEFAULT_BOUNDS, Curve
from lrope_gguf.errors import LropeError

from .generational import Generational, Generations
from .protocol import Candidate, Score
from .space import UNIFORM_FACTORS, CurveSpace, Genome, Ledger

_PER_CONTEXT = 1e6  # nats; more than any fitness


class RandomSearch:
    """Random smooth curves close to 1.

    Example:
        >>> algorithm = RandomSearch(n_layer=4, seed=1)
        >>> algorithm.ask().factors
        (1.0, 1.0, 1.0, 1.0)

    Args:
        n_layer, degree, bounds, lag, seed, uniform_factors, curves, width, max_retries: See `GeneticAlgorithm`.
    """

    def __init__(
        self,
        n_layer: int,
        *,
        degree: int = 3,
        bounds: tuple[float, float] = DEFAULT_BOUNDS,
        lag: int = 8,
        seed: int = 0,
        uniform_factors: Sequence[float] = UNIFORM_FACTORS,
        curves: Sequence[Curve] = (),
        width: float = 0.05,
        max_retries: int = 50,
    ) -> None:
        """Prepare the first candidates."""
        self.lag = lag
        self._space = CurveSpace(n_layer, degree=degree, bounds=bounds)
        self._ledger = Ledger(self._space)
        self._queue = self._space.known_good(uniform_factors, curves)
        self._rng = np.random.default_rng(seed)
        self._width, self._max_retries = width, max_retries
        self._exhausted = False

    def should_stop(self) -> bool:
        """Whether fresh candidates ran out."""
        return self._exhausted

    def ask(self) -> Candidate | None:
        """Return the next curve; None if ``lag`` are pending or at the end."""
        if self._exhausted or len(self._ledger.pending) >= self.lag:
            return None
        for _ in range(self._max_retries):
            genome, origin = (
                self._queue.pop(0) if self._queue else (self._space.smooth(self._rng, self._width), "random")
            )
            candidate = self._ledger.issue(genome, origin)
            if candidate is not None:
                return candidate
        self._exhausted = True
        return None

    def tell(self, candidate: Candidate, score: Score) -> None:
        """Note a score, which changes nothing.

        Raises:
            ValueError: it is not the oldest candidate that was asked for and not told.
        """
        self._ledger.settle(candidate, score)


class CmaEs(Generational):
    """CMA-ES (Hansen, arXiv 1604.00772) of the ``cmaes`` package, started at the best of the first curves.

    Example:
        >>> algorithm = CmaEs(n_layer=4, seed=1)
        >>> for _ in range(60):
        ...     candidate = algorithm.ask()
        ...     algorithm.tell(candidate, (1, -abs(sum(candidate.factors) - 4.4)))
        >>> abs(sum(candidate.factors) - 4.4) < 0.05
        True

    Args:
        n_layer, degree, bounds, seed, uniform_factors, curves: See `GeneticAlgorithm`.
        width: Initial step size, in units of log y.
        population: Candidates a generation; None: the package's choice, 4 + 3 ln(dimensions).

    Raises:
        LropeError: the package is not installed.
    """

    def __init__(
        self,
        n_layer: int,
        *,
        degree: int = 3,
        bounds: tuple[float, float] = DEFAULT_BOUNDS,
        seed: int = 0,
        uniform_factors: Sequence[float] = UNIFORM_FACTORS,
        curves: Sequence[Curve] = (),
        width: float = 0.05,
        population: int | None = None,
    ) -> None:
        """Prepare the first candidates."""
        space = CurveSpace(n_layer, degree=degree, bounds=bounds)
        first = space.known_good(uniform_factors, curves)
        population = population or 4 + int(3.0 * np.log(space.size))
        super().__init__(space, _cma_es(space, first, seed, width, population), lag=max(population, len(first)))


def _cma_es(
    space: CurveSpace, first: list[tuple[Genome, str]], seed: int, width: float, population: int
) -> Generations:
    try:
        from cmaes import CMA
    except ModuleNotFoundError as error:
        raise LropeError("--algorithm cma-es: cmaes is not installed; run: pip install 'lrope-gguf[cma-es]'") from error
    scores = yield first
    mean = first[max(range(len(first)), key=lambda i: scores[i])][0]
    box = space.box / space.scale[:, None]
    optimizer = CMA(mean=mean / space.scale, sigma=width, bounds=box, seed=seed, population_size=population)
    while not optimizer.should_stop():
        points = [optimizer.ask() for _ in range(population)]
        scores = yield [(point * space.scale, "cma-es") for point in points]
        optimizer.tell([(point, _cost(score)) for point, score in zip(points, scores, strict=True)])


class DifferentialEvolution(Generational):
    """Differential evolution (Storn and Price 1997) of SciPy.

    Example:
        >>> algorithm = DifferentialEvolution(n_layer=4, seed=1)
        >>> for _ in range(90):
        ...     candidate = algorithm.ask()
        ...     algorithm.tell(candidate, (1, -abs(sum(candidate.factors) - 4.4)))
        >>> abs(sum(candidate.factors) - 4.4) < 0.2
        True

    Args:
        n_layer, degree, bounds, seed, uniform_factors, curves: See `GeneticAlgorithm`.
        width: Spread of the random smooth curves that fill up generation 0.
        population: Candidates a generation, at least 5.
    """

    def __init__(
        self,
        n_layer: int,
        *,
        degree: int = 3,
        bounds: tuple[float, float] = DEFAULT_BOUNDS,
        seed: int = 0,
        uniform_factors: Sequence[float] = UNIFORM_FACTORS,
        curves: Sequence[Curve] = (),
        width: float = 0.05,
        population: int = 16,
    ) -> None:
        """Prepare the first candidates."""
        space = CurveSpace(n_layer, degree=degree, bounds=bounds)
        generator = np.random.default_rng(seed)
        first = space.known_good(uniform_factors, curves)
        first += [(space.smooth(generator, width), "random") for _ in range(max(population, 5) - len(first))]
        super().__init__(space, _differential_evolution(space, first, generator), lag=len(first))


class _AbandonedError(Exception):
    """Ends the thread of an optimizer that nobody asks any more."""


def _differential_evolution(
    space: CurveSpace, first: list[tuple[Genome, str]], generator: np.random.Generator
) -> Generations:
    """SciPy calls its objective, so it runs in a thread of its own, which waits while scores are awaited."""
    from scipy.optimize import Bounds, differential_evolution

    questions: queue.SimpleQueue[NDArray[np.float64] | None] = queue.SimpleQueue()
    answers: queue.SimpleQueue[list[Score] | None] = queue.SimpleQueue()

    def objective(points: NDArray[np.float64], /) -> Any:  # SciPy's types know of no vectorized objective
        questions.put(points.T)  # SciPy's has one point a column
        scores = answers.get()
        if scores is None:
            raise _AbandonedError
        return np.array([_cost(score) for score in scores])

    def run() -> None:
        try:
            differential_evolution(
                objective,
                Bounds(*space.box.T),
                init=np.array([genome for genome, _ in first]),
                maxiter=np.iinfo(np.int32).max,
                tol=0.0,
                rng=generator,
                polish=False,
                updating="deferred",
                vectorized=True,
            )
        except _AbandonedError:
            pass
        finally:
            questions.put(None)

    threading.Thread(target=run, name="differential evolution", daemon=True).start()
    try:
        origins = [origin for _, origin in first]
        while (points := questions.get()) is not None:
            answers.put((yield list(zip(points, origins, strict=True))))
            origins = ["de"] * len(points)
    finally:
        answers.put(None)


def _cost(score: Score) -> float:
    """A finite number for minimisers that orders as scores do: more contexts first, then fitness."""
    contexts, fitness = score
    limit = _PER_CONTEXT / 4.0
    return -(contexts * _PER_CONTEXT + min(max(fitness, -limit), limit))
