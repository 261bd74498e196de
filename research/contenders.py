"""What the product's optimizers are held against: other spaces, and the samplers of Optuna (an extra of its own).

Nothing here is part of the product. All begin with the same known factors and are driven as the search drives its own.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrope_gguf import LropeError
from lrope_gguf.curve import DEFAULT_BOUNDS, Curve
from lrope_search.optimizers.cma_es import CmaEs
from lrope_search.optimizers.layers import LayerSpace
from lrope_search.optimizers.make import make_algorithm
from lrope_search.optimizers.protocol import Candidate, Optimizer, Score
from lrope_search.optimizers.random_search import RandomSearch
from lrope_search.optimizers.settings import UNIFORM_FACTORS, optimizer_config
from lrope_search.optimizers.space import CurveSpace, Genome, Ledger, Space, Start, rounded
from lrope_search.scores import Factors

KNOTS = 4


class KnotSpace(Space):
    """Factors linear between knots at equal distances over the layers; a genome is the logarithm of each knot."""

    def __init__(self, n_layer: int, *, knots: int = KNOTS, bounds: tuple[float, float] = DEFAULT_BOUNDS) -> None:
        self.n_layer, self.bounds, self.size = n_layer, bounds, knots
        self.box = np.array([np.log(bounds)] * knots)
        self.scale = np.ones(knots)
        self._x, self._knots = np.linspace(0.0, 1.0, n_layer), np.linspace(0.0, 1.0, knots)

    def uniform(self, factor: float) -> Genome:
        return np.full(self.size, math.log(factor))

    def encode(self, curve: Curve | Factors) -> Genome:
        """Return the knots on a curve."""
        if not isinstance(curve, Curve):
            raise ValueError("factors of layers in a search of knots")
        return self.repair(np.log(np.interp(self._knots, self._x, curve.factors(self.n_layer))))

    def smooth(self, generator: np.random.Generator, width: float) -> Genome:
        """Return random knots: a level, a slope, and a little of each knot's own."""
        level, slope, *own = generator.standard_normal(self.size + 2)
        return self.repair(width * (level + slope * (2.0 * self._knots - 1.0) + np.array(own) / 2.0))

    def repair(self, genomes: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.minimum(np.maximum(genomes, self.box[:, 0]), self.box[:, 1])

    def express(self, genome: Genome) -> tuple[Curve | None, Factors]:
        return None, rounded(np.interp(self._x, self._knots, np.exp(genome)), 4)


class OptunaSampler:
    """A sampler of Optuna behind the product's protocol: one trial at a time, known factors enqueued first.

    Its samplers know the box of each coordinate and no width, so the box of log factors is cut to ``reach``; and as one
    ruined model would flatten all differences that count, no loss beyond ``lack`` is told.
    """

    lag = 1

    def __init__(
        self, space: Space, start: Sequence[Start], *, sampler: str, seed: int, reach: float, lack: float
    ) -> None:
        """Make the study."""
        optuna = _optuna(sampler)
        self._space, self._ledger, self._start = space, Ledger(space), deque(start)
        low, high = space.box.T.copy()
        logs = space.scale == 1.0  # the other coordinates are positions of control points
        low[logs], high[logs] = np.maximum(low[logs], -reach), np.minimum(high[logs], reach)
        self._distributions = {
            f"{i:03}": optuna.distributions.FloatDistribution(float(a), float(b))
            for i, (a, b) in enumerate(zip(low, high, strict=True))
        }
        self._low, self._high, self._lack = low, high, lack
        self._study = optuna.create_study(direction="minimize", sampler=_SAMPLERS[sampler](optuna, seed))
        self._trial: Any = None
        self._exhausted = False

    def ask(self) -> Candidate | None:
        """Return the next trial's candidate; a trial with known factors is told the score that they had."""
        if self._exhausted or self._ledger.pending:
            return None
        for _ in range(50):
            origin = "optuna"
            if self._start:
                genome, origin = self._start.popleft()
                within = np.clip(self._space.repair(genome), self._low, self._high)
                self._study.enqueue_trial({name: float(v) for name, v in zip(self._distributions, within, strict=True)})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial = self._study.ask(self._distributions)
            genome = np.array([trial.params[name] for name in self._distributions])
            candidate = self._ledger.issue(genome, origin)
            if candidate is not None:
                self._trial = trial
                return candidate
            known = self._ledger.find(genome)
            assert known is not None
            self._study.tell(trial, self._loss(self._ledger.scores[known]))
        self._exhausted = True
        return None

    def tell(self, candidate: Candidate, score: Score) -> None:
        self._ledger.settle(candidate, score)
        self._study.tell(self._trial, self._loss(score))

    def should_stop(self) -> bool:
        return self._exhausted

    def _loss(self, score: Score) -> float:
        return min(self._lack, -score[1])


def _optuna(sampler: str) -> Any:
    hint = {"optuna": "'lrope-gguf[research]'", "torch": "torch"}
    for name in ("optuna", "torch") if sampler == "gp" else ("optuna",):
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise LropeError(f"{sampler}: {name} is not installed; run: pip install {hint[name]}") from error
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _gp(optuna: Any, seed: int) -> Any:
    import torch

    torch.set_num_threads(1)  # small matrices; the cores are for other runs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental
        return optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)


_SAMPLERS: Mapping[str, Callable[[Any, int], Any]] = {
    "tpe": lambda optuna, seed: optuna.samplers.TPESampler(seed=seed),
    "gp": _gp,
}

_SPACES: Mapping[str, Callable[[int], Space]] = {
    "bezier": CurveSpace,
    "knots": KnotSpace,
    "layers": lambda n_layer: LayerSpace(n_layer, range(n_layer)),
}

OURS = ("both", "layers", "bezier")
"""What ``--parametrization`` takes, by the product's default algorithm."""

CONTENDERS = (*(f"ga-{space}" for space in OURS),
              *(f"{method}-{space}" for method in ("cma-es", "tpe", "gp", "random") for space in _SPACES),
              "de-bezier", "papers-ga-bezier")  # fmt: skip
"""A method and what it moves."""


def make_space(name: str, n_layer: int) -> Space:
    return _SPACES[name](n_layer)


def make_contender(
    name: str, n_layer: int, *, seed: int, width: float = 0.05, uniform_factors: Sequence[float] = UNIFORM_FACTORS,
    reach: float = math.inf, lack: float = 10.0,
) -> Optimizer:  # fmt: skip
    """Return a fresh contender.

    Args:
        name: One of `CONTENDERS`.
        n_layer: Layers of the model.
        seed: Seed of its generator.
        width: What the product knows of the size of good steps, in log factors; CMA-ES gets it too.
        uniform_factors: Known to all from the start, beside the identity.
        reach: Largest log factor, either way, that samplers without a width look at.
        lack: They are told no larger loss than this (nats).
    """
    if name not in CONTENDERS:
        raise LropeError(f"--contenders {name}: unknown; choose of {', '.join(CONTENDERS)}")
    method, space_name = name.rsplit("-", 1)
    if method in ("ga", "de", "papers-ga"):
        return make_algorithm(optimizer_config(method, width=width), n_layer, parametrization=space_name, seed=seed,
                              uniform_factors=uniform_factors)  # fmt: skip
    space = make_space(space_name, n_layer)
    start = space.known_good(uniform_factors)
    if method == "cma-es":
        return CmaEs(space, start, seed=seed, width=width)
    if method == "random":
        return RandomSearch(space, start, seed=seed, width=width)
    return OptunaSampler(space, start, sampler=method, seed=seed, reach=reach, lack=lack)
