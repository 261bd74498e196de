"""The optimizers that a search can choose from, by the names that ``--algorithm`` and ``config.json`` hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lrope_gguf.curve import DEFAULT_BOUNDS, Curve

from ..config import UNIFORM_FACTORS
from ..scores import Factors
from .cma_es import CmaEs
from .differential_evolution import DifferentialEvolution
from .genetic import GeneticAlgorithm
from .layers import LayerSpace
from .longrope import LongRopeEvolution
from .protocol import Optimizer
from .random_search import RandomSearch
from .space import CurveSpace

ALGORITHMS: dict[str, Callable[..., Optimizer]] = {
    "ga": GeneticAlgorithm,
    "cma-es": CmaEs,
    "de": DifferentialEvolution,
    "random": RandomSearch,
    "papers-ga": LongRopeEvolution,
}


def make_algorithm(
    name: str,
    n_layer: int,
    *,
    layers: Sequence[int] | None = None,
    parametrization: str = "bezier",
    seed: int = 0,
    degree: int = 3,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    uniform_factors: Sequence[float] = UNIFORM_FACTORS,
    curves: Sequence[Curve | Factors] = (),
    **options: Any,
) -> Optimizer:
    """Return a fresh optimizer.

    Args:
        name: One of `ALGORITHMS`.
        n_layer: Number of layers; candidates carry that many factors.
        layers: Those that may have factors of their own; None: all.
        parametrization: One of `PARAMETRIZATIONS`.
        seed: Seed of the algorithm's own generator.
        degree: Degree of the curve.
        bounds: Smallest and largest y of a control point.
        uniform_factors: Uniform scalings to begin with; those out of bounds are left out.
        curves: Further curves, or factors of all layers, to begin with.
        options: Further arguments of the algorithm, such as ``lag`` of ``ga``.

    Raises:
        KeyError: no such algorithm.
        ValueError: a seed curve that no candidate could be.
        TypeError: an option that the algorithm does not have.
    """
    curve = CurveSpace(n_layer, degree=degree, bounds=bounds)
    space: CurveSpace | LayerSpace = curve
    if parametrization != "bezier":
        own = range(n_layer) if layers is None else layers
        space = LayerSpace(n_layer, own, curve=curve if parametrization == "both" else None, bounds=bounds)
    return ALGORITHMS[name](space, space.known_good(uniform_factors, curves), seed=seed, **options)
