"""An optimizer for a model with so many layers, from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lrope_gguf.curve import DEFAULT_BOUNDS, Curve

from ..scores import PROPOSED, Factors, Tuned, rows_of
from .generational import Generational, Generations
from .genetic import GeneticConfig
from .layers import LayerSpace
from .listed import Listed
from .protocol import Optimizer
from .scan import ScanFirst
from .settings import UNIFORM_FACTORS, BaselineConfig, OptimizerConfig
from .space import CurveSpace, Start

_NEARBY = 0.5  # of the width, where what others propose is refined


def make_algorithm(
    config: OptimizerConfig,
    n_layer: int,
    *,
    layers: Sequence[int] | None = None,
    parametrization: str = "bezier",
    seed: int = 0,
    degree: int = 3,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    uniform_factors: Sequence[float] = UNIFORM_FACTORS,
    curves: Sequence[Curve | Factors] = (),
    proposals: Sequence[Factors] = (),
    alone: bool = False,
) -> Optimizer:
    """Return a fresh optimizer for ``n_layer`` factors.

    ``layers``: those that may have factors of their own; None: all. ``uniform_factors``: uniform scalings to begin
    with, those out of bounds left out. ``curves``: further curves, or factors of all layers, to begin with.
    ``proposals``: factors that derivatives have found, which are begun with too: then own factors alone are searched,
    by small steps and without a scan; or, ``alone`` or where heads have their own, nothing further. Raises
    `ValueError`: a curve that no candidate could be.
    """
    curve = CurveSpace(n_layer, degree=degree, bounds=bounds)
    space: CurveSpace | LayerSpace = curve
    own = range(n_layer) if layers is None else layers
    of_heads = [start for start in curves if isinstance(start, Tuned)]
    curves = [start for start in curves if not isinstance(start, Tuned)]
    if proposals:
        space = LayerSpace(n_layer, own, bounds=bounds)
        first = space.known_good(uniform_factors, curves)
        if any(map(rows_of, proposals)):
            listed = [(*space.express(space.repair(genome)), origin) for genome, origin in first]
            listed += [(None, start, "seed") for start in of_heads]
            return Listed([*listed, *((None, factors, PROPOSED) for factors in proposals)])
        first += [(space.encode(factors), PROPOSED) for factors in proposals]
        if alone:
            return Generational(space, _once(first), lag=len(first))
        nearby = {"nearby": True} if isinstance(config, GeneticConfig) else {}
        return replace(config, width=_NEARBY * config.width).make(space, first, seed, **nearby)
    if parametrization != "bezier":
        space = LayerSpace(n_layer, own, curve=curve if parametrization == "both" else None, bounds=bounds)
    start = space.known_good(uniform_factors, curves)
    if isinstance(config, BaselineConfig) and config.scan and isinstance(space, LayerSpace):
        return ScanFirst(space, start, lambda left, first: config.make(left, first, seed), width=config.width)
    return config.make(space, start, seed)


def _once(first: Sequence[Start]) -> Generations:
    yield first
