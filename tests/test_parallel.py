"""How the cores are divided: which divisions are tried, how they are compared, and that the result is the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import write_readable

from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.model import Model
from lrope_search.evaluation.parallel import Parallelism, compare_rates, divisions, fastest, measure_rates
from lrope_search.tasks import KeyValueTask

ALONE, ONE_EACH, TOGETHER = Parallelism(1, 1), Parallelism(2, 1), Parallelism(1, 2)


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "expected"),
    [
        (2, None, None, [(1, 1), (1, 2), (2, 1)]),
        (1, None, None, [(1, 1)]),
        (6, None, None, [(1, 1), (1, 3), (1, 6), (2, 3), (4, 1), (6, 1)]),
        (8, None, None, [(1, 1), (1, 4), (1, 8), (2, 4), (4, 2), (8, 1)]),
        (8, 2, None, [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4)]),  # and threads are found out
        (8, None, 4, [(1, 4)]),  # what was said stands
        (2, 2, 1, [(1, 1), (2, 1)]),  # measured for the estimate alone
        (2, 5, None, [(1, 1)]),
        (8, 3, 8, [(1, 2), (3, 2)]),
    ],
)
def test_what_is_tried(cores: int, workers: int | None, threads: int | None, expected: list[tuple[int, int]]) -> None:
    assert [(d.n_workers, d.n_threads) for d in divisions(cores, workers, threads)] == expected


@given(st.integers(1, 200))
def test_all_cores_are_used_and_no_more(cores: int) -> None:
    tried = divisions(cores, None, None)
    assert all(d.n_workers * d.n_threads <= cores for d in tried)
    assert {Parallelism(1, 1), Parallelism(1, cores), Parallelism(cores, 1)} <= set(tried)
    assert len(tried) <= 12


def test_the_fastest_counts_what_more_workers_cost() -> None:
    rates = {ALONE: 1000.0, TOGETHER: 1500.0, ONE_EACH: 1900.0}
    assert fastest(rates) == ONE_EACH
    assert fastest(rates, start_seconds=3.0, n_tokens=10_000) == TOGETHER  # 6.7 seconds against 5.3 and 3
    assert fastest(rates, start_seconds=3.0, n_tokens=1_000_000) == ONE_EACH
    assert fastest({ALONE: 1000.0, TOGETHER: 1050.0, ONE_EACH: 1090.0}) == ALONE  # as good as the same


class Machine:
    """A clock that trials move: seconds a unit of work in each division, and now and then a hiccup."""

    def __init__(self, seconds: dict[Parallelism, float], hiccups: Iterator[float]) -> None:
        self.seconds, self.hiccups, self.now = seconds, hiccups, 0.0
        self.trials: list[Parallelism] = []

    def trial(self, choice: Parallelism) -> float:
        elapsed = self.seconds[choice] + next(self.hiccups)
        self.now += elapsed
        self.trials.append(choice)
        return 1.0 / elapsed

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("when", range(9))
def test_a_hiccup_decides_nothing(when: int) -> None:
    hiccups = itertools.chain([0.0] * when, [0.7], itertools.repeat(0.0))
    machine = Machine({ALONE: 0.03, TOGETHER: 0.02, ONE_EACH: 0.015}, hiccups)
    rates = compare_rates(divisions(2, None, None), machine.trial, clock=machine.clock)
    assert max(rates, key=lambda choice: rates[choice]) == ONE_EACH
    assert machine.now < 1.5


def test_a_hopeless_division_is_tried_once() -> None:
    machine = Machine({ALONE: 0.03, TOGETHER: 2.0, ONE_EACH: 0.016}, itertools.repeat(0.0))
    rates = compare_rates(divisions(2, None, None), machine.trial, clock=machine.clock)
    assert machine.trials.count(TOGETHER) == 1 and machine.trials.count(ONE_EACH) == 3
    assert fastest(rates) == ONE_EACH
    assert machine.now < 2.5


def test_a_slow_model_is_measured_once() -> None:
    machine = Machine({ALONE: 3.0, TOGETHER: 1.6, ONE_EACH: 3.2}, itertools.repeat(0.0))
    compare_rates(divisions(2, None, None), machine.trial, clock=machine.clock)
    assert len(machine.trials) == 3


@pytest.mark.native
def test_a_model_is_measured_and_left_as_it_was(tmp_path_factory: pytest.TempPathFactory) -> None:
    """And scores are the same to the bit, whatever the threads."""
    path = write_readable(tmp_path_factory.mktemp("parallel") / "model.gguf")
    scores = []
    with Model(path, n_threads=3) as model:
        for n_threads in (1, 2, 3):
            model.set_threads(n_threads)
            evaluator = TeacherForcedEvaluator(model, KeyValueTask(6, probes=4))
            rates = measure_rates(model, divisions(2, None, None))
            assert set(rates) == {ALONE, TOGETHER, ONE_EACH} and min(rates.values()) > 0.0
            assert model.n_threads == n_threads
            scores.append([evaluator.evaluate((1.3,) * model.n_layer, "test", i).probes for i in range(3)])
    assert scores[0] == scores[1] == scores[2]
