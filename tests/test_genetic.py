"""The genetic algorithm alone, on functions that cost nothing, and its Gaussian process against textbook formulas."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm
from support.synthetic import Landscape, noise
from test_algorithms import play

from lrope_gguf.curve import Curve
from lrope_search.optimizers import genetic
from lrope_search.optimizers.genetic import GeneticAlgorithm
from lrope_search.optimizers.protocol import Candidate, Score
from lrope_search.optimizers.random_search import RandomSearch
from lrope_search.optimizers.space import CurveSpace
from lrope_search.optimizers.surrogate import GaussianProcess, expected_improvement


def test_begins_with_the_known_good_points() -> None:
    curve = Curve(((0.0, 1.0), (0.2, 1.1), (0.7, 1.2), (1.0, 0.9)))
    space = CurveSpace(9)
    ga = GeneticAlgorithm(space, space.known_good((0.9, 1.5, 5.0), (curve,)), population=14, lag=14)
    candidates = [ga.ask() for _ in range(14)]
    assert [c.origin for c in candidates] == ["identity", "uniform", "uniform", "seed", *["scan"] * 3, *["random"] * 7]
    assert candidates[0].factors == (1.0,) * 9
    assert [set(c.factors) for c in candidates[1:3]] == [{0.9}, {1.5}]  # 5 is out of bounds
    np.testing.assert_allclose(candidates[3].factors, curve.factors(9), atol=1e-4)
    spread = [abs(s - 1.0) for c in candidates[7:] for s in c.factors]
    assert statistics.mean(spread) > 0.01 and max(spread) < 0.3


@pytest.mark.parametrize("degree", [2, 3, 5])
def test_the_scan_raises_one_third_of_the_layers_at_a_time(degree: int) -> None:
    space = CurveSpace(25, degree=degree)
    bumps = [np.array(space.decode(genome).factors(25)) for genome in space.bumps(1.1)]
    assert [round(float(bump.max()), 3) for bump in bumps] == [1.1] * 3
    assert [int(bump.argmax()) for bump in bumps] == [0, 12, 24]
    assert all(bump.min() == 1.0 for bump in bumps)
    assert bumps[0][-1] == bumps[2][0] == bumps[1][0] == bumps[1][-1] == 1.0


def test_elitism_and_racing_order() -> None:
    ga = GeneticAlgorithm(CurveSpace(8), seed=2, parents=3, population=10)
    first = play(ga, 10, lambda c: (4, -float(c.id)))
    assert [c.id for c, _ in ga.parents] == [0, 1, 2]
    child = ga.ask()
    ga.tell(child, (4, -1.0))
    play(ga, 5, lambda c: (1, 100.0))
    # one context seen never outranks four; of equals the older leads
    assert [c.id for c, _ in ga.parents] == [0, 1, child.id]
    assert ga.best == (first[0][0], (4, 0.0))


def test_without_surrogate_and_crossover_it_is_the_textbook_mu_plus_one() -> None:
    """Replays the algorithm's own choices: each child is one of the best mu so far, plus its mutation."""

    class Spy(GeneticAlgorithm):
        pools: list[list[int]]

        def _pool(self):
            pool = super()._pool()
            ids = {self._ledger.genomes[i].tobytes(): i for i in range(len(self._ledger.genomes))}
            self.pools.append([ids[genome.tobytes()] for genome in pool])
            return pool

    ga = Spy(CurveSpace(12), seed=4, lag=1, proposals=1, crossover=0.0, parents=3, population=8)
    ga.pools = []
    told: list[tuple[Candidate, Score]] = []
    for _ in range(60):
        n = len(ga.pools)
        candidate = ga.ask()
        if candidate.id >= 8:
            assert candidate.origin == "mutation"
            reference = sorted(told, key=lambda item: (-item[1][1], item[0].id))[:3]
            assert all(pool == [c.id for c, _ in reference] for pool in ga.pools[n:]) and len(ga.pools) > n
        told.append((candidate, (1, -abs(sum(candidate.factors) - 12.9))))
        ga.tell(*told[-1])
    assert ga.best[1][1] > -0.1


def test_stops_when_an_evaluation_is_worth_no_more() -> None:
    def smooth(c: Candidate) -> Score:
        return 1, -float(np.sum(np.square(np.log(c.factors) - 0.05)))

    ended = GeneticAlgorithm(CurveSpace(6), seed=1, tolerance=1e-3)
    told = play(ended, 400, smooth)
    assert ended.should_stop() and 30 < len(told) < 200
    assert ended.best[1][1] > -2e-3  # and nothing was to be had any more
    endless = GeneticAlgorithm(CurveSpace(6), seed=1, tolerance=0.0)
    assert play(endless, len(told) + 20, smooth)[: len(told)] == told and not endless.should_stop()


def test_a_plateau_is_no_convergence() -> None:
    """Nothing is known about what an improvement could be where all are equal, nor where none is finite."""
    for fitness in (0.0, -math.inf):
        ga = GeneticAlgorithm(CurveSpace(8), seed=1, tolerance=1.0)
        assert len(play(ga, 50, lambda c, fitness=fitness: (1, fitness))) == 50


def gain(land: Landscape) -> Callable[[Candidate], Score]:
    base = [land.log_probability((1.0,) * land.n_layer, i) for i in range(3)]

    def fitness(c: Candidate) -> Score:
        return 3, statistics.mean(land.log_probability(c.factors, i) - b for i, b in enumerate(base))

    return fitness


def test_beats_random_search_of_the_same_budget() -> None:
    """On rugged landscapes, half as much gain again on average within 96 evaluations.

    The random search is a good one: its curves come from the same narrow, smooth prior.
    """
    ratios, wins = [], 0
    for seed in range(4):
        land = Landscape(seed=seed % 4, peak=(1.12, 1.3)[seed % 2])
        ga = GeneticAlgorithm(CurveSpace(land.n_layer), seed=seed)
        play(ga, 96, gain(land))
        random = max(score for _, score in play(RandomSearch(CurveSpace(land.n_layer), seed=seed), 96, gain(land)))[1]
        ratios.append(ga.best[1][1] / max(random, 0.02))
        wins += ga.best[1][1] > random
    assert wins >= 3
    assert statistics.mean(ratios) > 1.5, ratios


def test_the_surrogate_pays() -> None:
    """Within 60 evaluations it finds more than the same algorithm without it."""
    gains: dict[int, list[float]] = {1: [], 150: []}
    for seed in range(4):
        for proposals, found in gains.items():
            land = Landscape(seed=seed, peak=1.2)
            ga = GeneticAlgorithm(CurveSpace(land.n_layer), seed=seed, proposals=proposals)
            play(ga, 60, gain(land))
            found.append(ga.best[1][1])
    assert statistics.mean(gains[150]) > 1.15 * statistics.mean(gains[1]), gains


def test_fewer_contexts_count_less() -> None:
    """A candidate that races dropped early with a lucky score does not lead the search astray."""
    land = Landscape(seed=1, peak=1.2)
    full = gain(land)

    def raced(c: Candidate) -> Score:
        contexts, fitness = full(c)
        return (contexts, fitness) if fitness > 0.0 else (1, fitness + 0.1 * noise("lucky", c.factors))

    ga = GeneticAlgorithm(CurveSpace(land.n_layer), seed=0)
    play(ga, 80, raced)
    assert ga.best[1][0] == 3 and ga.best[1][1] > 0.05


def test_the_surrogate_is_told_of_noise_and_of_what_is_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, seen = [], []

    class Spy(GaussianProcess):
        def fit(self, x, y, weight, *, sweeps=0):
            weights.append(weight)
            super().fit(x, y, weight, sweeps=sweeps)

        def predict(self, x, pending=None):
            seen.append(pending)
            return super().predict(x, pending)

    monkeypatch.setattr(genetic, "GaussianProcess", Spy)
    ga = GeneticAlgorithm(CurveSpace(6), seed=1, population=12)
    told = play(ga, 12, lambda c: (4, 1.0 - c.id) if c.id % 3 == 0 else (1, -float(c.id)))
    asked = [ga.ask() for _ in range(3)]
    assert len(weights) == 3
    np.testing.assert_array_equal(weights[0], [1.0 if c.id % 3 == 0 else 0.25 for c, _ in told])
    assert seen[0] is None  # what the told are worth
    proposals = [inputs for inputs in seen if inputs is not None]
    assert [len(inputs) for inputs in proposals] == [0, 0, 1, 1, 2, 2]  # two rounds a birth
    np.testing.assert_allclose(proposals[-1], np.log([c.factors for c in asked[:2]]), atol=1e-3)


def test_equals_the_textbook_formulas() -> None:
    rng = np.random.default_rng(0)
    x, y, weight, at = rng.normal(size=(20, 3)), rng.normal(size=20), rng.uniform(0.5, 2.0, 20), rng.normal(size=(7, 3))
    process = GaussianProcess(3, length=1.5, noise=0.2)
    process.fit(x, y, weight)
    mean, deviation = process.predict(at)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        r = math.sqrt(5.0) * np.linalg.norm(a[:, None] - b, axis=2) / 1.5
        return (1.0 + r + r**2 / 3.0) * np.exp(-r)

    # Rasmussen and Williams 2006, eq. 2.25, 2.26; mean and variance by maximum likelihood
    covariance = kernel(x, x) + np.diag(0.2 / weight)
    ones = np.ones(20)
    level = ones @ np.linalg.solve(covariance, y) / (ones @ np.linalg.solve(covariance, ones))
    variance = (y - level) @ np.linalg.solve(covariance, y - level) / 20
    cross = kernel(at, x)
    np.testing.assert_allclose(mean, level + cross @ np.linalg.solve(covariance, y - level), atol=1e-6)
    spread = variance * (1.0 - np.diag(cross @ np.linalg.solve(covariance, cross.T)))
    np.testing.assert_allclose(deviation, np.sqrt(spread), atol=1e-6)


def test_fitting_raises_the_evidence_and_finds_the_input_that_matters() -> None:
    rng = np.random.default_rng(1)
    x = rng.uniform(-1.0, 1.0, (80, 2))
    y = np.sin(4.0 * x[:, 0]) + 0.05 * rng.normal(size=80)
    at = rng.uniform(-1.0, 1.0, (200, 2))
    errors = []
    for sweeps in (0, 6):
        process = GaussianProcess(2, length=0.2, noise=1.0)
        process.fit(x, y, np.ones(80), sweeps=sweeps)
        errors.append(float(np.sqrt(np.mean((process.predict(at)[0] - np.sin(4.0 * at[:, 0])) ** 2))))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.1


def test_pending_observations_count_as_if_they_had_come_as_expected() -> None:
    rng = np.random.default_rng(2)
    x, y, weight = rng.normal(size=(15, 2)), rng.normal(size=15), rng.uniform(0.5, 2.0, 15)
    pending, at = rng.normal(size=(4, 2)), rng.normal(size=(6, 2))
    process = GaussianProcess(2, length=1.0)
    process.fit(x, y, weight)
    expected, _ = process.predict(pending)
    mean, deviation = process.predict(at, pending=pending)
    told = GaussianProcess(2, length=1.0)
    told.fit(np.concatenate([x, pending]), np.concatenate([y, expected]), np.concatenate([weight, np.ones(4)]))
    np.testing.assert_allclose(told.predict(at)[0], mean, atol=1e-6)
    # told's variance comes from 19 observations, of which 4 tell nothing new
    np.testing.assert_allclose(told.predict(at)[1] * math.sqrt(19 / 15), deviation, rtol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_constant_observations_are_no_trouble(constant: float) -> None:
    process = GaussianProcess(2)
    x = np.zeros((5, 2))
    process.fit(x, np.full(5, constant), np.ones(5), sweeps=2)
    mean, deviation = process.predict(np.ones((3, 2)))
    np.testing.assert_allclose(mean, constant, atol=1e-9)
    assert np.isfinite(deviation).all() and np.isfinite(expected_improvement(mean, deviation, constant)).all()


def test_expected_improvement_is_the_integral() -> None:
    mean, deviation = np.array([0.0, -1.0, 2.0]), np.array([1.0, 0.5, 0.1])
    grid = np.linspace(-8.0, 8.0, 20001)
    integral = [
        np.trapezoid(np.maximum(grid - 0.3, 0.0) * norm.pdf(grid, m, d), grid)
        for m, d in zip(mean, deviation, strict=True)
    ]
    np.testing.assert_allclose(expected_improvement(mean, deviation, 0.3), integral, atol=1e-6)
