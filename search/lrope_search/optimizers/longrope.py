"""LongRoPE's evolutionary search, the yardstick; ``papers-ga`` on the command line and in old studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .generational import Generational, Generations
from .protocol import Score
from .settings import BaselineConfig, parents_setting, population_setting
from .space import Genome, Space, Start


class LongRopeEvolution(Generational):
    """LongRoPE's evolutionary search (arXiv 2402.13753, algorithm 1) on the control points of a curve.

    Population 64, the best 32 as parents, 16 mutations and 16 crossovers a generation, mutation probability 0.3;
    the search for layer-specific scaling (arXiv 2503.04355) takes the same. The papers' 40 iterations make 1344
    evaluations; here the caller sets the budget. A mutation draws each coordinate anew with that probability, in
    the range of the random smooth curves (the papers' ranges, made for extended contexts, do nothing but harm near
    the identity); a crossover takes each coordinate from the other parent with the same probability.

    Example:
        >>> from lrope_search.optimizers.space import CurveSpace
        >>> algorithm = LongRopeEvolution(CurveSpace(4), seed=1)
        >>> algorithm.lag
        64

    ``population``: size of generation 0; ``parents``: survivors; ``probability``: that a coordinate changes.
    """

    def __init__(
        self,
        space: Space,
        start: Sequence[Start] | None = None,
        *,
        seed: int = 0,
        width: float = 0.05,
        population: int = 64,
        parents: int = 32,
        mutations: int = 16,
        crossovers: int = 16,
        probability: float = 0.3,
    ) -> None:
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._width, self._probability = width, probability
        self._parents, self._mutations, self._crossovers = parents, mutations, crossovers
        first = space.known_good() if start is None else list(start)
        first += [(self._mutate(first[i % len(first)][0]), "mutation") for i in range(population - len(first))]
        super().__init__(space, self._evolve(first), lag=max(len(first), mutations + crossovers))

    def _evolve(self, members: list[Start]) -> Generations:
        survivors: list[tuple[Score, Genome]] = []
        while True:
            scores = yield members
            survivors += [(score, genome) for score, (genome, _) in zip(scores, members, strict=True)]
            survivors = sorted(survivors, key=lambda item: item[0], reverse=True)[: self._parents]
            genomes = [genome for _, genome in survivors]
            drawn = (genomes[int(self._rng.integers(len(genomes)))] for _ in range(self._mutations))
            members = [(self._mutate(genome), "mutation") for genome in drawn]
            for _ in range(self._crossovers):
                i, j = self._rng.choice(len(genomes), min(2, len(genomes)), replace=False)[[0, -1]]
                members.append((np.where(self._chosen(), genomes[j], genomes[i]), "crossover"))

    def _chosen(self) -> NDArray[np.bool_]:
        """The coordinates that change, at least one."""
        while not (chosen := self._rng.random(self._space.size) < self._probability).any():
            pass
        return chosen

    def _mutate(self, genome: Genome) -> Genome:
        reach = 2.0 * self._width * self._space.scale
        fresh = self._space.uniform(1.0) + reach * self._rng.uniform(-1.0, 1.0, self._space.size)
        return self._space.repair(np.where(self._chosen(), fresh, genome))


@dataclass(frozen=True, kw_only=True)
class LongRopeConfig(BaselineConfig):
    """Settings of `LongRopeEvolution`."""

    section = "papers-ga"
    summary = "LongRoPE's evolutionary search, as a baseline"
    algorithm = LongRopeEvolution

    population: int | None = population_setting("64")
    parents: int | None = parents_setting("32")
