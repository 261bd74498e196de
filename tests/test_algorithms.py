"""What every algorithm must keep of the protocol, and what the search relies on."""

from __future__ import annotations

import doctest
import importlib
import math
import random
import re
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.synthetic import Landscape, noise

from lrope_gguf.curve import Curve
from lrope_gguf.errors import LropeError
from lrope_search import optimizers
from lrope_search.optimizers.generational import Generational, Generations, minimised
from lrope_search.optimizers.make import make_algorithm
from lrope_search.optimizers.protocol import Candidate, Optimizer, Score, rank
from lrope_search.optimizers.settings import OPTIMIZERS, optimizer_config
from lrope_search.optimizers.space import CurveSpace, Ledger

pytest.importorskip("cmaes")
NAMES = pytest.mark.parametrize("name", list(OPTIMIZERS))
BOUNDS = [(0.5, 4.0), (0.98, 1.02), (1.0, 1.3), (0.7, 1.0), (0.123456, 1.00001)]


def key(candidate: Candidate) -> tuple[float, ...]:
    return tuple(round(s, 3) for s in candidate.factors)


def play(algorithm: Optimizer, budget: int, score: Callable[[Candidate], Score]) -> list[tuple[Candidate, Score]]:
    """Drive an algorithm as the search does; at the end all that was asked for is told."""
    told: list[tuple[Candidate, Score]] = []
    pending: list[Candidate] = []
    while len(told) < budget:
        room = len(told) + len(pending) < budget and len(pending) < algorithm.lag
        candidate = algorithm.ask() if room else None
        if candidate is not None:
            pending.append(candidate)
        elif pending:
            told.append((pending[0], score(pending[0])))
            algorithm.tell(*told[-1])
            del pending[0]
        else:
            assert algorithm.should_stop()
            break
    return told


def enough(name: str) -> int:
    """Evaluations beyond the first generation, which has up to 64; that of `ga` is small, and its surrogate slow."""
    return 30 if name == "ga" else 75


def bumpy(candidate: Candidate) -> Score:
    return 2, Landscape(len(candidate.factors)).log_probability(candidate.factors, 0)


@pytest.mark.parametrize("module", sorted(p.stem for p in Path(optimizers.__path__[0]).glob("[!_]*.py")))
def test_docstring_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"lrope_search.optimizers.{module}")).failed == 0


@NAMES
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_layer=st.integers(1, 40),
    degree=st.integers(1, 5),
    bounds=st.sampled_from(BOUNDS),
    width=st.sampled_from([0.01, 0.05, 1.0]),
)
def test_candidates_are_legal_and_never_repeat(
    name: str, seed: int, n_layer: int, degree: int, bounds: tuple[float, float], width: float
) -> None:
    algorithm = make_algorithm(optimizer_config(name, width=width), n_layer, degree=degree, bounds=bounds, seed=seed)
    told = play(algorithm, 36, lambda c: (1, noise(seed, c.factors)))
    for candidate, _ in told:
        x, y = zip(*candidate.curve.control_points, strict=True)
        assert len(x) == degree + 1 and x[0] == 0.0 and x[-1] == 1.0 and list(x) == sorted(x)
        assert all(bounds[0] <= v <= bounds[1] for v in y)
        assert all(bounds[0] <= v <= bounds[1] for v in candidate.factors)
        np.testing.assert_allclose(candidate.factors, candidate.curve.factors(n_layer), rtol=0, atol=1e-8)
    keys = [key(c) for c, _ in told]
    assert len(set(keys)) == len(keys)
    assert [c.id for c, _ in told] == list(range(len(told)))
    assert told[0][0].factors == (1.0,) * n_layer and told[0][0].origin == "identity"
    assert len(told) == 36 or algorithm.should_stop()


@NAMES
@pytest.mark.parametrize("workers", [2, 5])
def test_candidates_do_not_depend_on_which_result_comes_first(name: str, workers: int) -> None:
    """Nor on being asked in vain: k can be had when all up to k - lag are told; nobody foresees who finishes when."""
    algorithm = make_algorithm(optimizer_config(name), 12, seed=6)
    asked: list[Candidate] = []
    waiting: list[Candidate] = []  # in order of ids
    done: dict[int, Score] = {}
    order = random.Random(workers)
    while len(asked) < enough(name):
        candidate = algorithm.ask()
        if candidate is not None:
            asked.append(candidate)
            waiting.append(candidate)
            assert len(waiting) <= algorithm.lag
            continue
        assert algorithm.ask() is None and algorithm.ask() is None and not algorithm.should_stop()  # in vain
        while waiting[0].id not in done:
            running = [c for c in waiting if c.id not in done][:workers]
            finished = order.choice(running)
            done[finished.id] = bumpy(finished)
        algorithm.tell(waiting[0], done[waiting[0].id])
        del waiting[0]
    told, other = (play(make_algorithm(optimizer_config(name), 12, seed=s), enough(name), bumpy) for s in (6, 7))
    assert [c for c, _ in told] == asked and told != other


@NAMES
def test_scores_are_told_in_order(name: str) -> None:
    algorithm = make_algorithm(optimizer_config(name), 8, seed=1)
    first, second = algorithm.ask(), algorithm.ask()
    with pytest.raises(ValueError, match="candidate 0 is next"):
        algorithm.tell(second, (1, 0.0))
    stranger = Candidate(0, Curve(((0.0, 1.0), (1.0, 1.0))), (1.0,), "random")
    with pytest.raises(ValueError, match="candidate 0 is next"):
        algorithm.tell(stranger, (1, 0.0))
    algorithm.tell(first, (1, 0.0))
    algorithm.tell(second, (1, 0.0))
    with pytest.raises(ValueError, match="none is pending"):
        algorithm.tell(second, (1, 0.0))


@NAMES
def test_global_random_state_is_neither_used_nor_touched(name: str) -> None:
    np.random.seed(1)
    state = np.random.get_state()[1].tolist()
    first = play(make_algorithm(optimizer_config(name), 8), 24, bumpy)
    assert np.random.get_state()[1].tolist() == state
    np.random.seed(2)
    assert play(make_algorithm(optimizer_config(name), 8), 24, bumpy) == first


@NAMES
def test_useless_candidates_do_no_harm(name: str) -> None:
    """A model that yields NaN gives a fitness of -inf."""

    def score(c: Candidate) -> Score:
        return (1, -math.inf) if max(c.factors) > 1.06 else (2, -abs(sum(c.factors) - 8.2))

    told = play(make_algorithm(optimizer_config(name), 8, seed=1), 100, score)
    best = min(told, key=rank)
    assert max(best[0].factors) <= 1.06 and best[1][1] > -0.12
    play(make_algorithm(optimizer_config(name), 8, seed=1), 20, lambda c: (1, -math.inf))


@NAMES
def test_a_space_of_few_curves_is_exhausted(name: str) -> None:
    algorithm = make_algorithm(optimizer_config(name, width=0.001), 1, bounds=(0.998, 1.002), uniform_factors=())
    told = play(algorithm, 1000, lambda c: (1, -abs(c.factors[0] - 1.001)))
    assert {key(c) for c, _ in told} <= {(0.998,), (0.999,), (1.0,), (1.001,), (1.002,)}
    assert algorithm.should_stop() and algorithm.ask() is None


@NAMES
def test_callers_curves_come_early_and_of_the_right_degree(name: str) -> None:
    curve = Curve(((0.0, 1.0), (0.2, 1.1), (0.7, 1.2), (1.0, 0.9)))
    told = play(make_algorithm(optimizer_config(name), 9, uniform_factors=(0.9, 5.0), curves=(curve,)), 3, bumpy)
    assert [c.origin for c, _ in told] == ["identity", "uniform", "seed"]
    np.testing.assert_allclose(told[2][0].factors, curve.factors(9), atol=1e-4)
    with pytest.raises(ValueError, match="degree 1 in a search of degree 3"):
        make_algorithm(optimizer_config(name), 4, curves=(Curve(((0.0, 1.0), (1.0, 1.1))),))


@pytest.mark.parametrize("name", ["ga", "cma-es", "de", "papers-ga"])
def test_learns_from_scores(name: str) -> None:
    """The latest candidates are better than the first random ones; random search alone learns nothing."""

    def score(c: Candidate) -> Score:
        return 1, -float(np.sum(np.abs(np.log(c.factors) - np.linspace(0.0, 0.15, 8))))

    told = play(make_algorithm(optimizer_config(name), 8, seed=2), 100 if name == "ga" else 240, score)
    values = [fitness for _, (_, fitness) in told]
    assert np.median(values[-30:]) > np.median(values[8:16]) + 0.2


def test_the_papers_setting() -> None:
    """64, then 16 mutations and 16 crossovers of the best 32, each coordinate changed with probability 0.3."""
    algorithm: Any = make_algorithm(optimizer_config("papers-ga"), 12, seed=1)
    told = play(algorithm, 86, bumpy)
    space = CurveSpace(12)
    genomes = np.array([space.encode(c.curve) for c, _ in told])
    crossed = [c.id for c, _ in told if c.origin == "crossover"]
    mutated = list(range(crossed[0] - 16, crossed[0]))
    assert 58 <= mutated[0] <= 64 and crossed == list(range(crossed[0], crossed[-1] + 1))  # a few may repeat others
    best = [c.id for c, _ in sorted(told[: mutated[0]], key=rank)[:32]]
    changed = [np.min(np.sum(np.abs(genomes[best] - genomes[i]) > 1e-9, axis=1)) for i in mutated]
    assert 0.2 < np.mean(changed) / space.size < 0.4
    inherited = [np.min(np.abs(genomes[best] - genome), axis=0)[: space.degree + 1] for genome in genomes[crossed]]
    np.testing.assert_allclose(inherited, 0.0, atol=1e-9)


def test_costs_order_as_scores_do() -> None:
    scores = [(1, -math.inf), (1, -1e9), (1, -0.1), (1, 0.0), (1, 1e-6), (1, 50.0), (2, -math.inf), (2, -3.0), (8, 0.0)]
    costs = [minimised(score) for score in scores]
    assert all(map(math.isfinite, costs)) and costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs) - 1  # -inf and absurdly bad are the same


def test_a_repeated_genome_has_its_first_score() -> None:
    """Within a generation and from an earlier one; the optimizer sees all scores in the order of its genomes."""
    space = CurveSpace(4)
    a, b, c = (space.uniform(factor) for factor in (1.0, 1.1, 1.2))
    sent: list[list[Score]] = []

    def generations() -> Generations:
        for genomes in ([a, b, b], [b, c, a], [c, a]):
            sent.append((yield [(genome, "test") for genome in genomes]))

    algorithm = Generational(space, generations(), lag=3)
    told = play(algorithm, 10, lambda candidate: (1, -candidate.factors[0]))
    assert [c.factors[0] for c, _ in told] == [1.0, 1.1, 1.2] and algorithm.should_stop()
    first, second, third = (score for _, score in told)
    assert sent == [[first, second, second], [second, third, first], [third, first]]


def test_an_unknown_algorithm_or_option_is_an_error() -> None:
    with pytest.raises(LropeError, match=r"^--algorithm rando: unknown; choose from ga, cma-es"):
        optimizer_config("rando")
    with pytest.raises(LropeError, match=r"^ga.temperature: no such setting; algorithm ga has width, lag"):
        optimizer_config("ga", temperature=1.0)


def test_an_abandoned_differential_evolution_leaves_no_thread() -> None:
    def threads() -> int:
        return sum(thread.name == "differential evolution" for thread in threading.enumerate())

    before = threads()
    algorithm: Any = make_algorithm(optimizer_config("de"), 8)
    play(algorithm, 20, bumpy)
    assert threads() == before + 1
    del algorithm
    deadline = time.monotonic() + 10.0
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == before


@settings(max_examples=30, deadline=None)
@given(data=st.data(), degree=st.integers(1, 6), bounds=st.sampled_from(BOUNDS))
def test_repair_is_idempotent_and_alike_for_one_and_many(
    data: st.DataObject, degree: int, bounds: tuple[float, float]
) -> None:
    space = CurveSpace(9, degree=degree, bounds=bounds)
    values = st.lists(st.floats(-3.0, 3.0), min_size=2 * degree, max_size=2 * degree)
    genomes = np.array(data.draw(st.lists(values, min_size=1, max_size=4)))
    repaired = space.repair(genomes)
    assert np.array_equal(space.repair(repaired), repaired)
    assert np.array_equal(repaired, [space.repair(genome) for genome in genomes])
    x = repaired[:, degree + 1 :]
    assert np.all(np.diff(x, axis=1) >= 0.0) and np.all((repaired >= space.box[:, 0]) & (repaired <= space.box[:, 1]))
    # points move as pairs: each y goes where its x goes
    clipped = np.clip(genomes[0, degree + 1 :], 0, 1), np.clip(genomes[0, 1:degree], *np.log(bounds))
    assert sorted(zip(*clipped, strict=True)) == sorted(zip(x[0], repaired[0, 1:degree], strict=True))
    for genome in repaired:
        np.testing.assert_allclose(space.encode(space.decode(genome)), genome, atol=5e-4)
        exact = np.log(space.decode(genome).factors(9))
        np.testing.assert_allclose(space.log_factors([genome], np.linspace(0, 1, 9))[0], exact, atol=0.05)


def test_quick_factors_are_close_for_smooth_curves() -> None:
    space, generator = CurveSpace(24), np.random.default_rng(0)
    genomes = [space.smooth(generator, 0.2) for _ in range(30)]
    exact = np.log([space.decode(genome).factors(24) for genome in genomes])
    np.testing.assert_allclose(space.log_factors(genomes, np.linspace(0, 1, 24)), exact, atol=1e-3)


def test_the_ledger_knows_repeated_factors() -> None:
    space = CurveSpace(4)
    ledger = Ledger(space)
    one = ledger.issue(space.uniform(1.1), "uniform")
    assert one is not None and ledger.find(space.uniform(1.1)) == 0
    assert ledger.issue(space.uniform(1.1003), "uniform") is None  # equal to 1e-3
    other = ledger.issue(space.uniform(1.102), "uniform")
    assert other is not None and other.id == 1 and ledger.find(space.uniform(1.2)) is None


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    monkeypatch.setitem(sys.modules, "cmaes", None)
    algorithm = make_algorithm(optimizer_config("cma-es"), 4)
    with pytest.raises(LropeError, match="cmaes is not installed") as raised:
        algorithm.ask()
    extra = re.search(r"lrope-gguf\[(.*)\]", str(raised.value))
    assert extra is not None and any("cmaes" in item for item in extras["optional-dependencies"][extra[1]])
