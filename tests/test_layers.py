"""Layers with factors of their own: the space, the scan, and what the genetic algorithm makes of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_algorithms import play

from lrope_search.optimizers.genetic import GeneticAlgorithm
from lrope_search.optimizers.layers import LayerSpace
from lrope_search.optimizers.make import make_algorithm
from lrope_search.optimizers.protocol import Candidate, Optimizer, Score
from lrope_search.optimizers.scan import LayerScan, ScanFirst
from lrope_search.optimizers.settings import optimizer_config
from lrope_search.optimizers.space import CurveSpace

N_LAYER = 24
Landscape = Callable[[Sequence[float]], float]


def sparse(factors: Sequence[float]) -> float:
    """Layer 8 wants 1.2 and little else, 12 a bit, its neighbours and 15 tolerate nothing: as was measured."""
    x = np.log(np.array(factors))

    def wants(layer: int, best: float, gain: float) -> float:
        return gain * (math.exp(-0.5 * ((x[layer] - best) / 0.09) ** 2) - math.exp(-0.5 * (best / 0.09) ** 2))

    harm = sum(0.012 * (1.0 - math.exp(-0.5 * (x[i] / 0.08) ** 2)) for i in (6, 7, 9, 10, 11))
    harm += 0.048 * (1.0 - math.exp(-0.5 * (x[15] / 0.1) ** 2))
    return wants(8, 0.18, 0.037) + wants(12, 0.14, 0.009) - harm


def run(optimizer: Optimizer, n: int, landscape: Landscape) -> list[tuple[Candidate, Score]]:
    """Ask for ``n`` candidates, and tell them in their order."""
    return play(optimizer, n, lambda candidate: (1, landscape(candidate.factors)))


@pytest.mark.parametrize("curve", [None, CurveSpace(N_LAYER)])
@pytest.mark.parametrize("lag", [1, 8])
def test_a_gain_of_few_layers_is_found_where_a_curve_finds_none(curve: CurveSpace | None, lag: int) -> None:
    space = LayerSpace(N_LAYER, range(N_LAYER), curve=curve)
    told = run(GeneticAlgorithm(space, seed=3, lag=lag), 90, sparse)
    found = max(score for _, (_, score) in told)
    curves = run(GeneticAlgorithm(CurveSpace(N_LAYER), seed=3, lag=lag), 90, sparse)
    smooth = max(score for _, (_, score) in curves)
    assert found > 0.033 > 0.02 > smooth
    assert told == run(GeneticAlgorithm(space, seed=3, lag=lag), 90, sparse)


LATE = 0.5 / (1.0 + np.exp(-(np.linspace(0.0, 1.0, N_LAYER) - 0.6) / 0.08))
WEIGHT = 0.5 + 3.0 * np.exp(-5.0 * np.linspace(0.0, 1.0, N_LAYER))


def late(factors: Sequence[float]) -> float:
    """1 in the early layers, 1.65 in the late ones: a curve says it, and single layers hardly at all."""
    return float((WEIGHT * LATE**1.5).mean() - (WEIGHT * np.abs(np.log(factors) - LATE) ** 1.5).mean())


def test_a_smooth_gain_is_found_beside_own_layers_too() -> None:
    found = []
    for seed in range(4):
        space = LayerSpace(N_LAYER, range(N_LAYER), curve=CurveSpace(N_LAYER))
        told = run(GeneticAlgorithm(space, seed=seed, lag=8), 100, late)
        origins = [candidate.origin for candidate, _ in told]
        assert "random" in origins[: origins.index("layer scan")]  # curves come first
        found.append(max(score for _, (_, score) in told))
    assert np.mean(found) > 0.65 * late(np.exp(LATE))


def test_layers_that_gained_are_tried_together_before_any_is_lowered() -> None:
    told = run(GeneticAlgorithm(LayerSpace(N_LAYER, range(N_LAYER)), seed=1, lag=8), 50, sparse)
    scans = [candidate.id for candidate, _ in told if candidate.origin == "layer scan"]
    lowered = [i for i in scans if min(told[i][0].factors) < 1.0]
    together = [candidate for candidate, _ in told if candidate.origin == "together"]
    assert together and together[0].id < min(lowered)
    assert together[0].factors[8] > 1.1 < together[0].factors[12]


def test_nothing_is_lowered_where_a_curve_gains_more_than_any_layer() -> None:
    space = LayerSpace(N_LAYER, range(N_LAYER), curve=CurveSpace(N_LAYER))
    told = run(GeneticAlgorithm(space, seed=1, lag=8), 70, late)
    scanned = [candidate for candidate, _ in told if candidate.origin == "layer scan"]
    assert len(scanned) == N_LAYER and min(min(candidate.factors) for candidate in scanned) == 1.0

    scan = LayerScan(40, 0.18, -0.1)  # in groups: those must be split whatever a curve gains
    while not scan.raised:
        item = scan.next()
        assert item is not None
        scan.tell(*item, 0.0)
    scan.leave_lowering()
    assert not scan.done and scan.next() is not None


@pytest.mark.parametrize("curve", [None, CurveSpace(N_LAYER)])
def test_a_uniform_factor_that_gains_is_squared_as_long_as_it_gains(curve: CurveSpace | None) -> None:
    def uniform_asked(best: float) -> list[float]:
        def near(factors: Sequence[float]) -> float:
            return -float(np.abs(np.log(factors) - math.log(best)).mean())

        space = LayerSpace(N_LAYER, range(N_LAYER), curve=curve)
        told = run(GeneticAlgorithm(space, space.known_good((1.1, 1.25)), seed=1, lag=4), 30, near)
        return [round(candidate.factors[0], 2) for candidate, _ in told if candidate.origin == "uniform"]

    assert uniform_asked(1.1) == [1.1, 1.25]
    assert uniform_asked(2.6) == [1.1, 1.25, 1.56, 2.44, 4.0]  # within the bounds


def test_curves_are_bred_where_nothing_known_is_one() -> None:
    space = LayerSpace(4, range(4), curve=CurveSpace(4))
    told = run(GeneticAlgorithm(space, [(space.moved((1,), 0.1), "seed")], population=1, lag=1), 30, sum)
    assert len(told) > 12


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_the_scan_looks_at_every_layer_and_ends(n_layers: int, seed: int) -> None:
    effects = np.random.default_rng(seed).standard_normal(n_layers)
    scan = LayerScan(n_layers, 0.18, -0.1)
    asked = []
    while not scan.done:
        item = scan.next()
        assert item is not None
        asked.append(item)
        scan.tell(*item, float(sum(effects[list(item[0])]) * item[1]))
    assert len(set(asked)) == len(asked) <= 2 * n_layers + 16
    assert {i for group, log_factor in asked for i in group if log_factor > 0} == set(range(n_layers))
    assert scan.next() is None
    assert len(scan.relevant(8)) == min(8, len({g for g, _ in asked if len(g) == 1}))
    assert all(effects[i] * log_factor > 0 for i, log_factor in scan.gains())


def test_a_deep_model_is_scanned_in_groups_that_are_split_where_something_moves() -> None:
    scan = LayerScan(80, 0.18, -0.1)
    n = 0
    while (item := scan.next()) is not None:
        n += 1
        scan.tell(*item, 1.0 if 37 in item[0] and item[1] > 0 else 0.0)
    assert scan.done and n < 100  # of 120 one by one
    assert scan.relevant(1) == [37] and scan.gains() == [(37, 0.18)]


def test_the_scan_waits_for_its_results() -> None:
    scan = LayerScan(3, 0.18, -0.1)
    items = [scan.next() for _ in range(3)]
    assert scan.next() is None and not scan.done
    for item in items:
        assert item is not None
        scan.tell(*item, -math.inf)
    assert scan.next() == ((0,), -0.1)


def test_a_layer_whose_factor_is_refused_does_not_lead() -> None:
    scan = LayerScan(4, 0.18, -0.1)
    while (item := scan.next()) is not None:
        (layer,), log_factor = item
        scan.tell((layer,), log_factor, -math.inf if layer == 0 or log_factor < 0.0 else 0.01 * layer)
    assert scan.done and scan.relevant(4) == [3, 2, 1, 0] and [layer for layer, _ in scan.gains()] == [3, 2, 1]


def test_layers_that_do_not_count_stay_at_1() -> None:
    space = LayerSpace(6, (1, 4), curve=CurveSpace(6))
    generator = np.random.default_rng(0)
    for _ in range(50):
        curve, factors = space.express(space.smooth(generator, 0.2))
        assert curve is None
        assert {factors[i] for i in (0, 2, 3, 5)} == {1.0}
        assert all(0.5 <= factor <= 4.0 for factor in factors)
    assert space.express(space.uniform(1.1))[1] == (1.0, 1.1, 1.0, 1.0, 1.1, 1.0)
    whole = LayerSpace(6, range(6), curve=CurveSpace(6))  # of all layers a curve alone stays a curve
    curve, factors = whole.express(whole.uniform(1.1))
    assert curve is not None and factors == (1.1,) * 6
    moved = whole.express(whole.moved((2,), 0.1))
    assert moved == (None, (1.0, 1.0, round(math.exp(0.1), 4), 1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="layers"):
        LayerSpace(6, ())


def test_any_optimizer_can_follow_the_scan() -> None:
    """CMA-ES goes on from the layers that gained together."""
    optimizer = make_algorithm(optimizer_config("cma-es", scan=True), N_LAYER, parametrization="layers", seed=3)
    told = run(optimizer, 120, sparse)
    assert [candidate.id for candidate, _ in told] == list(range(len(told)))
    assert len({candidate.factors for candidate, _ in told}) == len(told)
    origins = [candidate.origin for candidate, _ in told]
    assert set(origins[origins.index("cma-es") :]) == {"cma-es"}
    best = {origin: max(s for c, (_, s) in told if c.origin == origin) for origin in ("together", "cma-es")}
    assert best["together"] > 0.03 < best["cma-es"]


@pytest.mark.parametrize("lag", [1, 5])
@pytest.mark.parametrize("name", ["cma-es", "random", "de"])
def test_what_follows_the_scan_is_told_all_that_it_asks(name: str, lag: int) -> None:
    class Spy:
        """Checks the protocol on behalf of the optimizer that follows."""

        def __init__(self, inner: Optimizer) -> None:
            self.inner, self.asked, self.told = inner, [], []  # type: ignore[var-annotated]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def ask(self) -> Candidate | None:
            candidate = self.inner.ask()
            self.asked += [] if candidate is None else [candidate]
            return candidate

        def tell(self, candidate: Candidate, score: Score) -> None:
            self.told.append((candidate, score))
            self.inner.tell(candidate, score)

    spies: list[Spy] = []

    def follow(space: LayerSpace, start: Sequence[Any]) -> Optimizer:
        assert set(space.layers) < set(range(N_LAYER)) and {8, 15} <= set(space.layers)
        spies.append(Spy(optimizer_config(name).make(space, start, 0)))
        return spies[0]

    space = LayerSpace(N_LAYER, range(N_LAYER), curve=CurveSpace(N_LAYER))
    told = run(ScanFirst(space, space.known_good(), follow, lag=lag), 90, sparse)
    (spy,) = spies
    assert [candidate for candidate, _ in spy.told] == spy.asked[: len(spy.told)] and len(spy.told) >= 20
    for candidate, (_, fitness) in spy.told:
        assert fitness == pytest.approx(sparse(candidate.factors), abs=2e-4)  # to the digits of factors
    assert len(told) == 90
