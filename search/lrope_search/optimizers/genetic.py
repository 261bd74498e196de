"""A genetic algorithm over layer factors, by a curve, by layer or both: ask, evaluate elsewhere, tell."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .layers import LayerSpace
from .protocol import Candidate, Score, rank
from .scan import ScanStage
from .settings import LAG, OptimizerConfig, lag_setting, parents_setting, population_setting
from .space import CurveSpace, Ledger, Start
from .surrogate import GaussianProcess, expected_improvement, one_thread

Genomes = NDArray[np.float64]


class GeneticAlgorithm:
    """Elitist steady-state (mu + 1) genetic algorithm that maximises; seeded, without input or output.

    Example:
        >>> ga = GeneticAlgorithm(CurveSpace(4), seed=1)
        >>> for _ in range(40):
        ...     candidate = ga.ask()
        ...     ga.tell(candidate, (1, -abs(sum(candidate.factors) - 4.4)))
        >>> ga.best[1][1] > -0.02
        True

    The first candidates are the identity, uniform scalings (position interpolation), the caller's curves, a scan of
    which layers tolerate more (one third of them raised at a time), and random smooth curves close to 1. Then every
    birth is a contest: of many proposals, the one of which a Gaussian process on the layer factors expects the most
    is evaluated (pre-selection by a surrogate: Jin 2011, "Surrogate-assisted evolutionary computation"). A proposal
    has one or two parents, each the better of two drawn (binary tournament): blend crossover (BLX-alpha, Eshelman and
    Schaffer 1993, by coordinate or along the line between the parents) and Gaussian mutation of random width and
    number of coordinates. A few proposals are random smooth curves. The best ten are the parents of a second round of
    proposals. Candidates that are pending count as if they had turned out as expected, so that no two births are alike.

    Where layers have factors of their own (`LayerSpace`), a scan comes before the births (`ScanStage`): each layer is
    raised alone, and those that move something are lowered as well. The layers that moved most are the coordinates of
    what follows. Beside a curve, half of all proposals are
    curves alone: where the gain is smooth, children that move everything learn the curve at half the pace.

    What something better has found is only refined: ``nearby``.

    Parents are the ``parents`` best of all told. The defaults are made for 50 to 400 evaluations.

    Args:
        space: Where the candidates come from.
        start: Genomes to begin with; None: those that ``known_good`` of the space gives.
        lag: Candidates that may be asked for before the first of them is told.
        population: Candidates before the first birth; more if those that are not random are more.
        parents: Survivors (mu).
        seed: Seed of the algorithm's own generator.
        width: Initial spread of log y; mutations are a fifth to six times as wide.
        crossover: Probability that a proposal has two parents rather than one.
        proposals: Proposals a round; 1: a plain genetic algorithm without surrogate.
        tolerance: Improvement in nats per answer token that is not worth an evaluation: where no more was to be
            expected of ``2 * lag`` births in a row, the algorithm counts as converged.
        own_layers: Layers that keep a coordinate after the scan, in a `LayerSpace`.
        max_retries: Births tried in place of one that repeats an earlier candidate (all factors equal to 1e-3)
            before the algorithm counts as converged.
        nearby: Begin with good genomes of a `LayerSpace` without a curve, and let all layers vary: no scan, and the end
            where `_IDLE` times ``lag`` scores in a row bring nothing better.
    """

    _ALPHA = 0.3  # how far blend crossover reaches beyond the parents
    _WIDTHS = (0.2, 6.0)  # narrowest and widest mutation, in units of `width`
    _IDLE = 3  # times the lag: tries in vain after which refining ends
    _RANDOM = 0.1  # share of proposals without parents
    _ROUNDS, _ELITE = 2, 10  # rounds of proposals, and how many of one round are the parents of the next
    _REFIT = 5  # scores after which the surrogate's lengths are looked at again
    _MEMORY = 60  # the surrogate knows so many of the best candidates and so many of the latest
    _PENDING = 128  # and so many of those that are pending, the latest: a thousand would take a second a birth

    def __init__(
        self,
        space: CurveSpace | LayerSpace,
        start: Sequence[Start] | None = None,
        *,
        lag: int = LAG,
        population: int = 16,
        parents: int = 8,
        seed: int = 0,
        width: float = 0.05,
        crossover: float = 0.5,
        proposals: int = 150,
        tolerance: float = 1e-4,
        own_layers: int = 8,
        max_retries: int = 50,
        nearby: bool = False,
    ) -> None:
        self.lag = lag
        self._space, self._nearby = space, nearby
        self._ledger = Ledger(space)
        self._mu, self._width, self._crossover, self._proposals = parents, width, crossover, proposals
        self._tolerance, self._max_retries = tolerance, max_retries
        self._rng = np.random.default_rng(seed)
        self._queue = deque(space.known_good() if start is None else start)
        self._among: list[int] = []  # layers with a coordinate after the scan, indices into those of the space
        curve = space.curve if isinstance(space, LayerSpace) else space
        if curve is not None:
            first = [(genome, "scan") for genome in curve.bumps(math.exp(1.5 * width))]
            n_random = population - len(self._queue) - len(first)
            first += [(curve.smooth(self._rng, width), "random") for _ in range(n_random)]
            own = np.zeros(space.size - curve.size)
            self._queue += [(np.concatenate([genome, own]), origin) for genome, origin in first]
        self._stage: ScanStage | None = None
        if isinstance(space, LayerSpace) and nearby:
            self._among = list(range(len(space.layers)))
        elif isinstance(space, LayerSpace):
            self._stage = ScanStage(space, self._queue, self._ledger, width=width, own_layers=own_layers)
            self._queue = deque()
        self._told: list[tuple[Candidate, Score]] = []  # best first
        self._visible = np.empty(0, np.bool_)  # whether the surrogate can tell a candidate from others, by id
        self._inputs = self._see(np.empty((0, space.size)))  # of the surrogate, by candidate id
        self._surrogate = self._fresh_surrogate()
        self._fitted = 0  # scores when its lengths were last looked at
        self._hopeless = 0  # births in a row of which little was expected
        self._reached: Score = (0, -math.inf)
        self._idle = 0  # scores in a row that were no better
        self._converged = False

    @property
    def best(self) -> tuple[Candidate, Score]:
        """The best candidate told so far; IndexError before any was."""
        return self._told[0]

    @property
    def parents(self) -> tuple[tuple[Candidate, Score], ...]:
        """The survivors, best first."""
        return tuple(self._told[: self._mu])

    def should_stop(self) -> bool:
        """Whether the algorithm has converged."""
        return self._converged

    def ask(self) -> Candidate | None:
        """Return the next of the first candidates, then children; None if ``lag`` are pending or at the end."""
        if self._converged or len(self._ledger.pending) >= self.lag:
            return None
        if self._stage is not None and not self._stage.done:
            candidate = self._stage.ask()
            if candidate is not None:
                self._notice(candidate)
            self._look_at_the_scan(self._stage)
            if candidate is not None or not self._stage.done:
                return candidate
        if self._hopeless < 2 * self.lag and not (self._nearby and self._idle >= self._IDLE * self.lag):
            for _ in range(self._max_retries):
                candidate = self._ledger.issue(*self._next())
                if candidate is not None:
                    self._notice(candidate)
                    return candidate
        self._converged = True
        return None

    def tell(self, candidate: Candidate, score: Score) -> None:
        """Let ``candidate`` compete for survival.

        Raises `ValueError`: it is not the oldest candidate that was asked for and not told.
        """
        self._ledger.settle(candidate, score)
        self._told = sorted([*self._told, (candidate, score)], key=rank)
        contexts, fitness = score
        better = contexts > self._reached[0] or fitness > self._reached[1] + self._tolerance
        if contexts >= self._reached[0] and better:
            self._reached, self._idle = score, 0
        else:
            self._idle += 1
        if self._stage is not None:
            self._stage.tell(candidate, score)
            self._look_at_the_scan(self._stage)

    def _look_at_the_scan(self, stage: ScanStage) -> None:
        """Take over when the scan knows which layers matter."""
        if stage.relevant is not None and not self._among:
            self._choose_layers(stage.relevant)

    def _choose_layers(self, relevant: Sequence[int]) -> None:
        """Let the layers that moved most be the coordinates from now on."""
        self._among = list(relevant)
        genomes = np.array(self._ledger.genomes)
        self._inputs = self._see(genomes)
        self._visible = self._can_tell(genomes)
        self._surrogate = self._fresh_surrogate()

    def _notice(self, candidate: Candidate) -> None:
        """Let the surrogate see a candidate."""
        genome = np.array(self._ledger.genomes[-1:])
        self._inputs = np.concatenate([self._inputs, self._see(genome)])
        self._visible = np.concatenate([self._visible, self._can_tell(genome)])

    def _see(self, genomes: Genomes) -> NDArray[np.float64]:
        """Return what the surrogate is given of genomes: log factors, shape ``(m, d)``."""
        space = self._space
        if isinstance(space, LayerSpace):
            return space.log_factors(genomes, self._among)
        return space.log_factors(genomes, np.linspace(0.0, 1.0, min(space.n_layer, space.size)))

    def _can_tell(self, genomes: Genomes) -> NDArray[np.bool_]:
        """Return which genomes differ from others in what the surrogate sees alone."""
        space = self._space
        if not isinstance(space, LayerSpace):
            return np.ones(len(genomes), np.bool_)
        hidden = [space.n_curve + i for i in range(len(space.layers)) if i not in self._among]
        return np.asarray(~genomes[:, hidden].any(axis=1))

    def _fresh_surrogate(self) -> GaussianProcess:
        return GaussianProcess(self._inputs.shape[1], length=4.0 * self._width)

    def _next(self) -> Start:
        if self._queue:
            return self._queue.popleft()
        if not self._told:
            return self._space.smooth(self._rng, self._width), "random"
        if self._proposals == 1:
            genomes, origins = self._children(self._pool(), 1)
            return genomes[0], origins[0]
        with one_thread():
            return self._contest()

    def _pool(self) -> Genomes:
        """The parents' genomes, best first."""
        seen = [candidate.id for candidate, _ in self._told if self._visible[candidate.id]][: self._mu]
        return np.array([self._ledger.genomes[i] for i in seen])

    def _contest(self) -> Start:
        """Return the most promising of many proposals."""
        best, scale = self._learn()
        pool = self._pool()
        pending = self._inputs[max(len(self._told), len(self._inputs) - self._PENDING) :]
        genomes, origins, promise = np.empty((0, self._space.size)), np.empty(0, np.str_), np.empty(0)
        for _ in range(self._ROUNDS):
            fresh, fresh_origins = self._children(pool, self._proposals)
            inputs = self._see(fresh)
            mean, deviation = self._surrogate.predict(inputs, pending=pending)
            genomes, origins = np.concatenate([genomes, fresh]), np.concatenate([origins, fresh_origins])
            promise = np.concatenate([promise, expected_improvement(mean, deviation, best)])
            elite = np.argsort(-promise, kind="stable")[: self._ELITE]
            genomes, origins, promise = genomes[elite], origins[elite], promise[elite]
            pool = genomes
        first = next((i for i, genome in enumerate(genomes) if self._ledger.find(genome) is None), 0)
        self._hopeless = self._hopeless + 1 if promise[first] * scale < self._tolerance else 0
        return genomes[first], str(origins[first])

    def _learn(self) -> tuple[float, float]:
        """Fit the surrogate to what was told.

        Returns:
            The surrogate's opinion of the best candidate, and the worth of a unit of it in nats.
        """
        n = len(self._ledger.scores)
        recent = set(range(max(0, n - self._MEMORY), n))
        known = np.array(sorted(recent | {candidate.id for candidate, _ in self._told[: self._MEMORY]}))
        known = known[self._visible[known]]
        contexts, fitness = np.array(self._ledger.scores, dtype=np.float64)[known].T
        observed, scale = _flatten(fitness, self.best[1][1])
        weight = contexts / contexts.max()
        refit = self._fitted == 0 or n - self._fitted >= self._REFIT
        sweeps = 0 if not refit else 4 if self._fitted == 0 else 1
        if refit:
            self._fitted = n
        self._surrogate.fit(self._inputs[known], observed, weight, sweeps=sweeps)
        best = float(self._surrogate.predict(self._inputs[known])[0].max())
        return best, scale

    def _children(self, pool: Genomes, n: int) -> tuple[Genomes, NDArray[np.str_]]:
        """Return ``n`` repaired genomes and their origins; ``pool`` holds possible parents, best first."""
        space = self._space
        if isinstance(space, CurveSpace):
            return self._curve_children(space, pool, n)
        if space.curve is None:
            return self._layer_children(space, pool, n)
        bare = self._bare(space, pool)
        genomes, origins = self._layer_children(space, pool, n // 2)
        curves, more = self._curve_children(space.curve, bare[:, : space.n_curve], n - n // 2)
        own = np.zeros((len(curves), len(space.layers)))
        return np.concatenate([genomes, np.concatenate([curves, own], axis=1)]), np.concatenate([origins, more])

    def _bare(self, space: LayerSpace, pool: Genomes) -> Genomes:
        """Return the best genomes that are curves without own layers: those of ``pool``, or else of all told."""
        bare = pool[~pool[:, space.n_curve :].any(axis=1)]
        if not len(bare):
            told = np.array([self._ledger.genomes[candidate.id] for candidate, _ in self._told])
            bare = told[~told[:, space.n_curve :].any(axis=1)][: self._mu]
        return bare if len(bare) else space.uniform(1.0)[None]

    def _curve_children(self, space: CurveSpace, pool: Genomes, n: int) -> tuple[Genomes, NDArray[np.str_]]:
        """Return ``n`` repaired genomes of curves and their origins."""
        rng, size = self._rng, space.size
        mother, father = pool[rng.integers(len(pool), size=(2, 2, n)).min(axis=0)]
        line = rng.random((n, 1)) < 0.5
        share = np.where(line, rng.random((n, 1)), rng.random((n, size))) * (1.0 + 2.0 * self._ALPHA) - self._ALPHA
        crossed = rng.random((n, 1)) < self._crossover
        genomes = np.where(crossed, mother + share * (father - mother), mother)
        low, high = np.log(self._WIDTHS)
        width = self._width * np.exp(rng.uniform(low, high, (n, 1)))
        mutated = rng.random((n, size)) < rng.uniform(0.5, 1.0, (n, 1))
        genomes += width * space.scale * mutated * rng.standard_normal((n, size))
        origins = np.where(crossed[:, 0], "crossover", "mutation")
        for i in range(int(self._RANDOM * n)):
            genomes[i], origins[i] = space.smooth(rng, 2.0 * self._width), "random"
        return space.repair(genomes), origins

    def _layer_children(self, space: LayerSpace, pool: Genomes, n: int) -> tuple[Genomes, NDArray[np.str_]]:
        """Return ``n`` repaired genomes and their origins, which move few layers: effects are sparse.

        Half of the crossovers take from each parent the layers that it moved further, so that gains come together.
        """
        rng, size = self._rng, space.size
        mother, father = pool[rng.integers(len(pool), size=(2, 2, n)).min(axis=0)]
        share = rng.random((n, size)) * (1.0 + 2.0 * self._ALPHA) - self._ALPHA
        blend = mother + share * (father - mother)
        base = space.uniform(1.0)
        union = np.where(np.abs(mother - base) >= np.abs(father - base), mother, father)
        crossed = rng.random((n, 1)) < self._crossover
        genomes = np.where(crossed, np.where(rng.random((n, 1)) < 0.5, union, blend), mother)
        low, high = np.log(self._WIDTHS)
        width = self._width * np.exp(rng.uniform(low, high, (n, 1)))
        active = np.zeros(size, np.bool_)
        active[: space.n_curve] = True
        active[[space.n_curve + i for i in self._among]] = True
        mutated = active & (rng.random((n, size)) < rng.uniform(0.1, 0.7, (n, 1)))
        if space.curve:
            bent = rng.random((n, 1)) < 0.5  # a child moves the curve, as `_children` would, or layers of their own
            mutated[:, : space.n_curve] = bent & (rng.random((n, space.n_curve)) < rng.uniform(0.5, 1.0, (n, 1)))
            mutated[:, space.n_curve :] &= ~bent
        genomes += width * space.scale * mutated * rng.standard_normal((n, size))
        back = active & (rng.random((n, size)) < (1.0 / size if self._nearby else 0.1))  # what does nothing should be 1
        genomes = np.where(back, base, genomes)
        origins = np.where(crossed[:, 0], "crossover", "mutation")
        for i in range(int(self._RANDOM * n)):
            genomes[i], origins[i] = space.smooth(rng, 2.0 * self._width, self._among), "random"
        return space.repair(genomes), origins


def _flatten(fitness: NDArray[np.float64], best: float) -> tuple[NDArray[np.float64], float]:
    """Return the fitness on a scale that shows the best in detail and ruined models as much the same, and its unit.

    ``-log(1 + (best - fitness) / unit)``, at most 0; the unit in nats is what the third best tenth lacks to the best.
    """
    finite = np.isfinite(fitness)
    lack = np.full(len(fitness), math.inf)
    lack[finite] = np.maximum(best - fitness[finite], 0.0)
    if not finite.any():
        return np.zeros(len(fitness)), math.inf
    unit = float(np.quantile(lack[finite], 0.3))
    if unit == 0.0:  # a plateau: nothing is known about what an improvement could be
        return -(lack > 0.0).astype(np.float64), math.inf
    return -np.log1p(np.where(finite, lack, lack[finite].max()) / unit), unit


@dataclass(frozen=True, kw_only=True)
class GeneticConfig(OptimizerConfig):
    """Settings of `GeneticAlgorithm`."""

    section = "ga"
    summary = "a genetic algorithm after a scan of the layers"
    algorithm = GeneticAlgorithm

    lag: int = lag_setting()
    population: int | None = population_setting("16", "candidates before the first children")
    parents: int | None = parents_setting("8")
