"""CMA-ES, of the ``cmaes`` package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrope_gguf.errors import LropeError

from .generational import Generational, Generations, minimised
from .settings import BaselineConfig, population_setting
from .space import Space, Start


class CmaEs(Generational):
    """CMA-ES (Hansen, arXiv 1604.00772) of the ``cmaes`` package, started at the best of the first curves.

    Example:
        >>> from lrope_search.optimizers.space import CurveSpace
        >>> algorithm = CmaEs(CurveSpace(4), seed=1)
        >>> for _ in range(60):
        ...     candidate = algorithm.ask()
        ...     algorithm.tell(candidate, (1, -abs(sum(candidate.factors) - 4.4)))
        >>> abs(sum(candidate.factors) - 4.4) < 0.05
        True

    ``width``: initial step size. ``population``: candidates a generation; None: 4 + 3 ln(dimensions).

    Raises:
        LropeError: the package is not installed.
    """

    def __init__(
        self,
        space: Space,
        start: Sequence[Start] | None = None,
        *,
        seed: int = 0,
        width: float = 0.05,
        population: int | None = None,
    ) -> None:
        first = space.known_good() if start is None else list(start)
        population = population or 4 + int(3.0 * np.log(space.size))
        super().__init__(space, _cma_es(space, first, seed, width, population), lag=max(population, len(first)))


def _cma_es(space: Space, first: list[Start], seed: int, width: float, population: int) -> Generations:
    try:
        from cmaes import CMA
    except ModuleNotFoundError as error:
        raise LropeError("algorithm cma-es: cmaes is not installed; run: pip install 'lrope-gguf[cma-es]'") from error
    scores = yield first
    mean = first[max(range(len(first)), key=lambda i: scores[i])][0]
    box = space.box / space.scale[:, None]
    optimizer = CMA(mean=mean / space.scale, sigma=width, bounds=box, seed=seed, population_size=population)
    while not optimizer.should_stop():
        points = [optimizer.ask() for _ in range(population)]
        scores = yield [(point * space.scale, "cma-es") for point in points]
        optimizer.tell([(point, minimised(score)) for point, score in zip(points, scores, strict=True)])


@dataclass(frozen=True, kw_only=True)
class CmaEsConfig(BaselineConfig):
    """Settings of `CmaEs`."""

    section = "cma-es"
    summary = "CMA-ES, as a baseline"
    algorithm = CmaEs

    population: int | None = population_setting("4 + 3 ln(dimensions)")
