"""An optimizer for a model with so many layers, from its settings."""

from __future__ import annotations

from collections.abc import Sequence

from lrope_gguf.curve import DEFAULT_BOUNDS, Curve

from ..scores import Factors
from .layers import LayerSpace
from .protocol import Optimizer
from .scan import ScanFirst
from .settings import UNIFORM_FACTORS, BaselineConfig, OptimizerConfig
from .space import CurveSpace


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
) -> Optimizer:
    """Return a fresh optimizer for ``n_layer`` factors.

    ``layers``: those that may have factors of their own; None: all. ``uniform_factors``: uniform scalings to begin
    with, those out of bounds left out. ``curves``: further curves, or factors of all layers, to begin with. Raises
    `ValueError`: a curve that no candidate could be.
    """
    curve = CurveSpace(n_layer, degree=degree, bounds=bounds)
    space: CurveSpace | LayerSpace = curve
    if parametrization != "bezier":
        own = range(n_layer) if layers is None else layers
        space = LayerSpace(n_layer, own, curve=curve if parametrization == "both" else None, bounds=bounds)
    start = space.known_good(uniform_factors, curves)
    if isinstance(config, BaselineConfig) and config.scan and isinstance(space, LayerSpace):
        return ScanFirst(space, start, lambda left, first: config.make(left, first, seed), width=config.width)
    return config.make(space, start, seed)
