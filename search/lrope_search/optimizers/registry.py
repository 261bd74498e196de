"""The optimizers that a search can choose from, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lrope_gguf.curve import DEFAULT_BOUNDS, Curve

from .baselines import CmaEs, DifferentialEvolution, RandomSearch
from .genetic import GeneticAlgorithm
from .longrope import PapersGeneticAlgorithm
from .protocol import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "ga": GeneticAlgorithm,
    "cma-es": CmaEs,
    "de": DifferentialEvolution,
    "random": RandomSearch,
    "papers-ga": PapersGeneticAlgorithm,
}


def make_algorithm(
    name: str,
    n_layer: int,
    *,
    seed: int = 0,
    degree: int = 3,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    curves: Sequence[Curve] = (),
    **options: Any,
) -> Algorithm:
    """Return a fresh optimizer.

    Args:
        name: One of `ALGORITHMS`.
        n_layer: Number of layers; candidates carry that many factors.
        seed: Seed of the algorithm's own generator.
        degree: Degree of the curve.
        bounds: Smallest and largest y of a control point.
        curves: Further curves to begin with, of the same degree.
        options: Further arguments of the algorithm, such as ``lag`` of ``ga``.

    Raises:
        KeyError: no such algorithm.
        ValueError: a seed curve of another degree.
        TypeError: an option that the algorithm does not have.
    """
    return ALGORITHMS[name](n_layer, seed=seed, degree=degree, bounds=bounds, curves=curves, **options)
