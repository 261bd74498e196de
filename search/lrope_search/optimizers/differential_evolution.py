"""Differential evolution, of SciPy."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .generational import Generational, Generations, minimised
from .protocol import Score
from .settings import BaselineConfig, population_setting
from .space import Space, Start


class DifferentialEvolution(Generational):
    """Differential evolution (Storn and Price 1997) of SciPy.

    Example:
        >>> from lrope_search.optimizers.space import CurveSpace
        >>> algorithm = DifferentialEvolution(CurveSpace(4), seed=1)
        >>> for _ in range(90):
        ...     candidate = algorithm.ask()
        ...     algorithm.tell(candidate, (1, -abs(sum(candidate.factors) - 4.4)))
        >>> abs(sum(candidate.factors) - 4.4) < 0.2
        True

    ``width``: spread of the random curves that fill generation 0. ``population``: candidates a generation, at least 5.
    """

    def __init__(
        self,
        space: Space,
        start: Sequence[Start] | None = None,
        *,
        seed: int = 0,
        width: float = 0.05,
        population: int = 16,
    ) -> None:
        generator = np.random.default_rng(seed)
        first = space.known_good() if start is None else list(start)
        first += [(space.smooth(generator, width), "random") for _ in range(max(population, 5) - len(first))]
        super().__init__(space, _differential_evolution(space, first, generator), lag=len(first))


class _AbandonedError(Exception):
    """Ends the thread of an optimizer that nobody asks any more."""


def _differential_evolution(space: Space, first: list[Start], generator: np.random.Generator) -> Generations:
    """SciPy calls its objective, so it runs in a thread of its own, which waits while scores are awaited."""
    from scipy.optimize import Bounds, differential_evolution

    questions: queue.SimpleQueue[NDArray[np.float64] | None] = queue.SimpleQueue()
    answers: queue.SimpleQueue[list[Score] | None] = queue.SimpleQueue()
    genomes, origins = np.array([genome for genome, _ in first]), [origin for _, origin in first]

    def objective(points: NDArray[np.float64], /) -> Any:  # SciPy's types know of no vectorized objective
        questions.put(points.T)  # SciPy's has one point a column
        scores = answers.get()
        if scores is None:
            raise _AbandonedError
        return np.array([minimised(score) for score in scores])

    def run() -> None:
        try:
            endless: Any = {"maxiter": np.iinfo(np.int32).max, "tol": 0.0, "polish": False, "init": genomes}
            bounds = Bounds(*space.box.T)
            differential_evolution(objective, bounds, rng=generator, updating="deferred", vectorized=True, **endless)
        except _AbandonedError:
            pass
        finally:
            questions.put(None)

    threading.Thread(target=run, name="differential evolution", daemon=True).start()
    try:
        while (points := questions.get()) is not None:
            answers.put((yield list(zip(points, origins, strict=True))))
            origins = ["de"] * len(points)
    finally:
        answers.put(None)


@dataclass(frozen=True, kw_only=True)
class DifferentialEvolutionConfig(BaselineConfig):
    """Settings of `DifferentialEvolution`."""

    section = "de"
    summary = "differential evolution, as a baseline"
    algorithm = DifferentialEvolution

    population: int | None = population_setting("16")
