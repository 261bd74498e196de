"""What a search and a measurement begin with: silence, how the cores are divided, a dry run that leaves nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import write_readable

from lrope_gguf.errors import LropeError
from lrope_search import (
    ModelConfig,
    SearchConfig,
    WorkersConfig,
    estimate,
    measure,
    optimizer_config,
    search,
    task_config,
)
from lrope_search import session as session_module
from lrope_search.evaluation import make
from lrope_search.evaluation.evaluator import TeacherForcedEvaluator
from lrope_search.evaluation.memory import MemoryNeeded
from lrope_search.evaluation.model import Model
from lrope_search.evaluation.parallel import Parallelism, compare_rates, divisions, fastest, measure_rates
from lrope_search.session import Session
from lrope_search.tasks import KeyValueTask
from lrope_search.tasks.settings import TaskMix

native = pytest.mark.native

TASK = task_config("kv", keys=6, probes=3, identifiers="number")
SETTINGS = SearchConfig(
    max_evaluations=6, algorithm=optimizer_config("ga", population=4), search_contexts=2, validation_contexts=1,
    test_contexts=2, max_kl=100.0,
)  # fmt: skip
SIDES = {"other": (1.1,) * 6}
Lines = list[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    # trained on so few tokens that a warning is due
    return ModelConfig(str(write_readable(tmp_path_factory.mktemp("session") / "model.gguf", context_length=32)))


def rates_are(patch: pytest.MonkeyPatch, rates: dict[tuple[int, int], float]) -> None:
    """Let the machine have two cores, and so many tokens a second in each division of them, 100 if not said."""
    patch.setattr(session_module, "physical_cores", lambda: 2)
    patch.setattr(session_module, "_START_SECONDS", 0.0)
    measured = {Parallelism(*division): rates.get(division, 100.0) for division in ((1, 1), (1, 2), (2, 1))}
    patch.setattr(make, "measure_rates", lambda model, choices: {c: measured[c] for c in choices})


CALLS: dict[str, Callable[..., object]] = {
    "search": lambda model, place, **more: search(model, TASK, SETTINGS, place, **more),
    "estimate": lambda model, place, **more: estimate(model, TASK, SETTINGS, place, **more),
    "measure": lambda model, place, **more: measure(model, TASK, SIDES, contexts=2, directory=place, **more),
}


@native
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_progress_is_silenced_or_goes_to_a_function(
    call: Callable[..., object], model: ModelConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing of Python, llama.cpp or another process reaches either stream."""
    call(model, tmp_path / "silent", progress=False, workers=WorkersConfig(2))
    assert capfd.readouterr() == ("", "")
    rates_are(monkeypatch, {})
    lines: Lines = []
    call(model, tmp_path / "lines", progress=lines.append)
    assert capfd.readouterr() == ("", "")
    assert any("the model was trained on 32" in line for line in lines)
    call(model, tmp_path / "shown")
    shown = capfd.readouterr()
    assert shown.out == "" and "the model was trained on 32" in shown.err
    log = tmp_path / "lines" / "log.txt"
    assert all(line in log.read_text() for line in lines) if log.exists() else call is CALLS["estimate"]


@native
def test_a_dry_run_is_a_session_that_is_not_continued(model: ModelConfig, tmp_path: Path) -> None:
    lines: Lines = []
    estimate(model, TASK, SETTINGS, tmp_path / "s", progress=lines.append)
    assert not (tmp_path / "s").exists()
    assert any(line.startswith("about ") and line.endswith(f"; results go to {tmp_path}/s") for line in lines)
    search(model, TASK, SETTINGS, tmp_path / "s", progress=False)
    estimate(model, TASK, SETTINGS, tmp_path / "s", progress=False)  # and one that is there is looked at


@native
def test_the_result_is_the_same_however_the_cores_are_divided(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = [], []
    for fast in ((1, 1), (1, 2), (2, 1)):
        rates_are(monkeypatch, {fast: 900.0})
        lines: Lines = []
        place = tmp_path / f"{fast}"
        search(model, TASK, SETTINGS, place, progress=lines.append)
        found.append([(place / name).read_bytes() for name in ("best.json", "config.json", "candidates.jsonl")])
        said.append(next(line for line in lines if line.startswith("fastest")).partition(" (")[0])
    assert found[0] == found[1] == found[2]
    assert said == [f"fastest here and now: {d}" for d in (
        "1 worker with 1 thread", "1 worker with 2 threads", "2 workers with 1 thread each")]  # fmt: skip


RATES = {(1, 1): 100.0, (1, 2): 150.0, (2, 1): 190.0, (2, 2): 50.0}


def settled(
    workers: int | None, threads: int | None, free: int | None = None, most: int = 9
) -> tuple[tuple[int, int], float, Lines]:
    """How the cores are divided, how many times as fast that is, and what is said, on two cores without a model."""
    choices = divisions(2, workers, threads)
    measured = {choice: RATES[choice.n_workers, choice.n_threads] for choice in choices} if len(choices) > 1 else {}
    alone = {choice: rate for choice, rate in measured.items() if choice.n_workers == 1}
    n_threads = fastest(alone).n_threads if alone else choices[0].n_threads
    facts = SimpleNamespace(rates=measured, n_threads=n_threads, n_tokens=1000, memory=MemoryNeeded(100, 60, 40))
    lines: Lines = []
    said = SimpleNamespace(line=lines.append)
    parts: list[Any] = [None, ModelConfig("m", n_threads=threads), None, facts, None, said]
    session = Session(*parts, WorkersConfig(workers), *cast(list[Any], [None] * 4), free)
    times = session.divide(1000, most)
    return (session._division.n_workers, session._division.n_threads), times, lines


@pytest.mark.parametrize(
    ("workers", "threads", "expected", "times"),
    [
        (None, None, (2, 1), 190 / 150),
        (None, 1, (1, 1), 1.0),
        (None, 2, (1, 2), 1.0),
        (1, None, (1, 2), 1.0),
        (2, None, (2, 1), 1.9),
        (2, 1, (2, 1), 1.9),  # once said to take as long as one worker
        (2, 4, (2, 2), 50 / 150),
        (5, None, (5, 1), 2.0),
    ],
)
def test_what_the_user_says_stands(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, threads: int | None, expected: tuple[int, int], times: float
) -> None:
    monkeypatch.setattr(session_module, "physical_cores", lambda: 2)
    monkeypatch.setattr(session_module, "visible_gpus", tuple)
    found, fast, lines = settled(workers, threads)
    assert found == expected
    assert fast == pytest.approx(times)
    chosen = any(line.startswith("fastest here and now: ") for line in lines)
    assert chosen == (threads is None and workers in (None, 1))
    assert ("5 workers on 2 cores: fewer would be faster (--workers)" in lines) == (workers == 5)


def test_more_workers_are_taken_only_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "visible_gpus", tuple)
    assert settled(None, None, free=300)[0] == (2, 1)
    assert settled(None, None, free=299)[0] == (1, 2)
    assert settled(None, None, most=1)[0] == (1, 2)  # of so few evaluations that can be out at once
    with pytest.raises(LropeError, match=r"^--workers 2: need .* are free; give at most 1$"):
        settled(2, None, free=299)


@native
def test_the_first_worker_takes_the_threads_that_were_settled(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone it would have been content with one thread; beside two workers, two threads are the better bargain."""
    rates_are(monkeypatch, {(1, 1): 92.0, (1, 2): 100.0, (2, 1): 105.0})
    used: list[int] = []
    set_threads = Model.set_threads
    monkeypatch.setattr(Model, "set_threads", lambda self, n: used.append(n) or set_threads(self, n))
    measure(model, TASK, SIDES, contexts=1, progress=False)
    assert used == [1, 2]


@native
def test_all_workers_write_what_the_first_has_heard(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands before a value is found out once, not by each worker with its own number of threads."""
    measure(model, TASK, SIDES, contexts=1, directory=tmp_path / "s", progress=False, workers=WorkersConfig(1))
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    spec = make.EvaluatorSpec(model, TASK, guarded=False)
    with spec() as evaluator:
        facts = make.find_out(evaluator)
    assert [str(lead) for lead in facts.leads] == [config["task"]["answer_lead"]]
    monkeypatch.setattr("lrope_search.evaluation.evaluator.write_answers", lambda *_: pytest.fail("wrote again"))
    with spec.settled(facts)() as evaluator:
        assert make.find_out(evaluator).leads == facts.leads


@native
def test_contexts_that_cannot_be_are_refused_before_anything_is_computed(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "measure_rates", lambda *_: pytest.fail("measured first"))
    monkeypatch.setattr(make, "write_texts", lambda *_, **__: pytest.fail("wrote first"))
    tasks = TaskMix.of([(TASK, 1.0), (task_config("multikey", context_tokens=40, probes=20), 1.0)])
    with (
        pytest.raises(LropeError, match=r"^--context-tokens 40: 20 pairs alone take"),
        make.EvaluatorSpec(model, tasks, choices=(Parallelism(1, 1),))(),
    ):
        pytest.fail("made an evaluator")


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


@native
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
