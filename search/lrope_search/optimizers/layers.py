"""Factors of layers' own, beside a curve or without one.

On a real model one layer can carry more than the best smooth curve, its neighbours can tolerate nothing, and most do
nothing at all (research/results.md). A curve of few control points cannot say that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lrope_gguf.curve import DEFAULT_BOUNDS, Curve

from ..scores import Factors
from .space import CurveSpace, Genome, Space, rounded

Group = tuple[int, ...]
"""Indices into `LayerSpace.layers` that are moved together."""


class LayerSpace(Space):
    """A curve over all layers, if there is one, times an own factor for each of ``layers``; all others are 1.

    A genome is the curve's genome (`CurveSpace`) followed by the logarithm of each own factor. Layers that do not
    rotate over the whole context have no say in what stands in its middle; leave them out of ``layers``.
    """

    def __init__(
        self,
        n_layer: int,
        layers: Sequence[int],
        *,
        curve: CurveSpace | None = None,
        bounds: tuple[float, float] = DEFAULT_BOUNDS,
    ) -> None:
        """Hold the settings; ``curve`` has the same bounds.

        Raises `ValueError`: no layers, or some that the model does not have.
        """
        if not layers or not set(layers) <= set(range(n_layer)):
            raise ValueError(f"layers {list(layers)} of {n_layer}")
        self.n_layer, self.layers, self.curve, self.bounds = n_layer, tuple(layers), curve, bounds
        self.n_curve = curve.size if curve else 0
        self.size = self.n_curve + len(self.layers)
        own = np.array([np.log(bounds)] * len(self.layers))
        self.box = np.concatenate([curve.box, own]) if curve else own
        self.scale = np.concatenate([curve.scale if curve else [], np.ones(len(self.layers))])

    def uniform(self, factor: float) -> Genome:
        """Return the genome that scales all of ``layers`` alike."""
        own = np.full(len(self.layers), 0.0 if self.curve else math.log(factor))
        return np.concatenate([self.curve.uniform(factor), own]) if self.curve else own

    def moved(self, group: Group, log_factor: float) -> Genome:
        """Return the genome in which only the layers of ``group`` differ from 1."""
        genome = self.uniform(1.0)
        genome[[self.n_curve + i for i in group]] = log_factor
        return self.repair(genome)

    def smooth(self, generator: np.random.Generator, width: float, among: Sequence[int] | None = None) -> Genome:
        """Return a random candidate: a smooth curve, if there is one, and up to three layers of their own.

        ``among``: indices into ``layers`` to choose from; None: all.
        """
        genome = self.uniform(1.0)
        if self.curve and generator.random() < 0.5:
            genome[: self.n_curve] = self.curve.smooth(generator, width)
        indices = np.arange(len(self.layers)) if among is None else np.asarray(among)
        chosen = generator.choice(indices, min(len(indices), int(generator.integers(1, 4))), replace=False)
        genome[self.n_curve + chosen] = 3.0 * width * generator.standard_normal(len(chosen))
        return self.repair(genome)

    def repair(self, genomes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Clip to the bounds, and put the curve's control points in order; shape ``(size,)`` or ``(m, size)``."""
        repaired: NDArray[np.float64] = np.minimum(np.maximum(genomes, self.box[:, 0]), self.box[:, 1])
        if self.curve:
            repaired[..., : self.n_curve] = self.curve.repair(repaired[..., : self.n_curve])
        return repaired

    def log_factors(self, genomes: NDArray[np.float64], among: Sequence[int]) -> NDArray[np.float64]:
        """Return what a surrogate sees of genomes, shape ``(m, k)``: log factors of some layers, then of the curve.

        ``among``: indices into ``layers``, of which the own factors are taken; of a curve some samples follow.
        """
        own = genomes[:, [self.n_curve + i for i in among]]
        if self.curve is None:
            return own
        x = np.linspace(0.0, 1.0, min(self.n_layer, self.curve.size))
        return np.concatenate([own, self.curve.log_factors(genomes[:, : self.n_curve], x)], axis=1)

    def encode(self, curve: Curve | Factors) -> Genome:
        """Return the genome of a curve, as a curve if it has our degree, or of the factors of all layers.

        Layers that are not among ours stay 1. Raises `ValueError`: factors of another number of layers.
        """
        if isinstance(curve, Curve) and self.curve and len(curve.control_points) == self.curve.degree + 1:
            return np.concatenate([self.curve.encode(curve), np.zeros(len(self.layers))])
        factors = curve.factors(self.n_layer) if isinstance(curve, Curve) else curve
        if len(factors) != self.n_layer:
            raise ValueError(f"{len(factors)} factors for {self.n_layer} layers")
        genome = self.uniform(1.0)
        genome[self.n_curve :] = np.log(np.asarray(factors, dtype=np.float64)[list(self.layers)])
        return self.repair(genome)

    def express(self, genome: Genome) -> tuple[Curve | None, Factors]:
        """Return the factors of a repaired genome, to 1e-4, and the curve if it alone makes them."""
        factors = np.ones(self.n_layer)
        own = genome[self.n_curve :]
        if self.curve:
            curve, smooth = self.curve.express(genome[: self.n_curve])
            if not own.any() and len(self.layers) == self.n_layer:
                return curve, smooth
            factors[list(self.layers)] = np.array(smooth)[list(self.layers)]
        low, high = self.bounds
        moved = list(self.layers)
        factors[moved] = np.clip(factors[moved] * np.exp(own), low, high)
        return None, rounded(factors, 4)
