"""Factors of layers' own, beside a curve or without one; and the scan that finds the few layers that matter.

On a real model one layer can carry more than the best smooth curve, its neighbours can tolerate nothing, and most do
nothing at all (research/results.md). A curve of few control points cannot say that.
"""

from __future__ import annotations

import math
from collections import deque
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

        Raises:
            ValueError: no layers, or some that the model does not have.
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

        Layers that are not among ours stay 1.

        Raises:
            ValueError: factors of another number of layers.
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


class LayerScan:
    """Which layers matter: each, or each group of a deep model, is raised alone; of what moves, more is asked.

    First every group is raised. The half that moved the fitness most is lowered as well. Where groups hold several
    layers, the layers of the quarter that moved most are then looked at one by one in the same way (adaptive group
    testing). What is asked depends on results alone.
    """

    _MOST = 32  # groups at first

    def __init__(self, n_layers: int, raised: float, lowered: float) -> None:
        """Plan for ``n_layers`` layers: log factors ``raised`` and ``lowered``."""
        self._directions = (raised, lowered)
        n_groups = min(n_layers, self._MOST)
        self._groups: list[Group] = [tuple(part.tolist()) for part in np.array_split(np.arange(n_layers), n_groups)]
        self._waiting: deque[tuple[Group, float]] = deque((group, raised) for group in self._groups)
        self._out = 0
        self._lowering = False
        self.effects: dict[tuple[Group, float], float] = {}
        """Fitness of each group and log factor that was tried."""
        self.done = False

    @property
    def raised(self) -> bool:
        """Whether all groups of this stage were raised, and lowering begins."""
        return self._lowering

    def leave_lowering(self) -> None:
        """Lower nothing, and end, if each layer was raised by itself; groups must still be split."""
        if self._lowering and all(len(group) == 1 for group in self._groups):
            self._waiting.clear()
            self.done = not self._out

    def next(self) -> tuple[Group, float] | None:
        """Return what to try next; None if results must come first, or at the end."""
        if not self._waiting:
            return None
        self._out += 1
        return self._waiting.popleft()

    def tell(self, group: Group, log_factor: float, fitness: float) -> None:
        """Take a result; when a stage is complete, plan the next one."""
        self.effects[group, log_factor] = fitness
        self._out -= 1
        if self._waiting or self._out:
            return
        raised, lowered = self._directions
        if not self._lowering:
            self._lowering = True
            half = self._most_moved(self._groups)[: (len(self._groups) + 1) // 2]
            self._waiting.extend((group, lowered) for group in sorted(half))
            return
        several = [group for group in self._most_moved(self._groups) if len(group) > 1]
        self._groups = [(i,) for group in several[: (len(several) + 3) // 4] for i in group]
        self._lowering = False
        self._waiting.extend((group, raised) for group in sorted(self._groups))
        self.done = not self._waiting

    def relevant(self, most: int) -> list[int]:
        """Return up to ``most`` layers by how much they moved the fitness alone, either way; the most first."""
        return [group[0] for group in self._most_moved([g for g in self._tried() if len(g) == 1])[:most]]

    def gains(self) -> list[tuple[int, float]]:
        """Return layers that gained alone, each with its better log factor, the best first."""
        best: dict[int, tuple[float, float]] = {}
        for (group, log_factor), fitness in self.effects.items():
            if len(group) == 1 and fitness > max(0.0, best.get(group[0], (0.0, 0.0))[1]):
                best[group[0]] = (log_factor, fitness)
        order = sorted(best, key=lambda layer: (-best[layer][1], layer))
        return [(layer, best[layer][0]) for layer in order]

    def _tried(self) -> list[Group]:
        return list(dict.fromkeys(group for group, _ in self.effects))

    def _most_moved(self, groups: Sequence[Group]) -> list[Group]:
        def moved(group: Group) -> float:
            # what llama.cpp refuses says nothing of the layer
            found = [self.effects.get((group, direction), 0.0) for direction in self._directions]
            return max(abs(value) if math.isfinite(value) else 0.0 for value in found)

        return sorted(groups, key=lambda group: (-moved(group), group))
