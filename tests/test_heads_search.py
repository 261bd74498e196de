"""A search of what heads have of their own: candidates, records, resumption, selection, what is written and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from support.synthetic import Landscape, noise
from support.tiny_models import write_readable
from test_ascend import SETTINGS as OF_LAYERS
from test_ascend import STEPS, TINY, opened, origins

from lrope_gguf.cli import main
from lrope_gguf.curve import CurveFile
from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import read_model
from lrope_search import ModelConfig, SearchConfig, climbing, launch, search, task_config
from lrope_search.evaluation.model import Model
from lrope_search.evaluation.tuning import Tuner
from lrope_search.optimizers.listed import Listed
from lrope_search.report.page import write_report
from lrope_search.report.reading import read_study
from lrope_search.report.text import summary_lines
from lrope_search.results.objective import Objective
from lrope_search.scores import (
    ContextScore,
    DivergenceScore,
    ProbeScore,
    Tuned,
    n_changed,
    numbers_of,
    rows_of,
    tuned,
    with_numbers,
)
from lrope_search.study.ascend import NAME, Trail, ascend, pruned
from lrope_search.study.conclude import SearchOutcome
from lrope_search.study.plan import make_optimizer
from lrope_search.study.progress import Progress
from lrope_search.study.run import run_search
from lrope_search.study.store import Study, parse_evaluations
from lrope_search.workers.protocol import LocalExecutor

SETTINGS = replace(OF_LAYERS, method="gradient", scale="queries", max_kl=10.0)
SHAPE = (4, 0, 8, 4)
"""Heads of each of four layers, of which one does not attend."""
TOP = np.zeros(16)
TOP[[1, 6, 11]] = 0.4, -0.3, 0.5
ONES = (1.0,) * 4


def scaled(logs: Any) -> Tuned:
    scales = iter(np.round(np.exp(logs), 4).tolist())
    return Tuned(ONES, None, tuple(tuple(next(scales) for _ in range(n)) for n in SHAPE))


class Queries(Landscape):
    """Three of 16 heads matter: answers get likelier near their scales, all others only cost divergence."""

    def __init__(self) -> None:
        super().__init__(4)

    def log_probability(self, factors: tuple[float, ...], context: object) -> float:
        scales = rows_of(factors).get("query_scales", ((1.0,) * 16,))
        at = np.log([scale for row in scales for scale in row])
        of_layers = float(np.abs(np.log(factors)).sum())
        wanted = np.flatnonzero(TOP)
        return -1.5 + 3.0 * (0.5 - float(((at - TOP)[wanted] ** 2).sum())) - of_layers + 0.02 * noise(scales, context)

    def divergence(self, factors: tuple[float, ...]) -> DivergenceScore:
        kl = float((np.log(numbers_of(factors)) ** 2).sum())
        return DivergenceScore(kl, kl, n_tokens=512, seconds=0.0)


class Hill:
    """Climbs towards the top; the heads that do not matter are moved a little too."""

    def __init__(self, fail: int = 0) -> None:
        self.at, self.number, self.fail, self.done, self.at_bound = np.zeros(16), 0, fail, False, ()

    @property
    def factors(self) -> Tuned:
        return scaled(self.at)

    def step(self) -> Any:
        self.number += 1
        if self.number == self.fail:
            raise KeyboardInterrupt
        self.at = self.at + 0.4 * (TOP + 0.05 * np.cos(np.arange(16.0)) - self.at)
        state = {"at": self.at.tolist(), "number": self.number}
        found = {"number": self.number, "gains": {"kv": -1.0}, "divergence": 0.1, "n_tokens": 300, "seconds": 0.5}
        return SimpleNamespace(to_json=lambda: found | {"state": state})

    def restore(self, state: Mapping[str, Any]) -> None:
        self.at, self.number = np.array(state["at"]), state["number"]


def run(directory: Path, fail: int = 0, settings: SearchConfig = SETTINGS) -> tuple[SearchOutcome, list[str]]:
    lines: list[str] = []
    land, progress = Queries(), Progress(lines.append, quiet=True)
    with Study(directory, {"task": "synthetic", "search": settings.identity()}) as study:
        trail = ascend(study, settings.gradient_steps, lambda: opened(cast(Any, Hill(fail))), progress)
        optimizer = make_optimizer(settings, 4, None, trail.proposals(settings.bounds))
        outcome = run_search(
            LocalExecutor(land), study, settings, progress,
            algorithm=optimizer, guard_contexts=1, ascent=trail.summary(),
        )  # fmt: skip
    return outcome, lines


def test_killed_at_every_step_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    for number in range(1, STEPS + 1):
        with pytest.raises(KeyboardInterrupt):
            run(killed, number)
        assert len(Trail.of(killed).steps) == number - 1
    run(killed)
    lines = (killed / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (30, 45):  # in the middle of candidates, and of the test
        (killed / "evaluations.jsonl").write_bytes(b"".join(lines[:kept]))
        run(killed)
        for name in ("best.json", "candidates.jsonl", NAME):
            assert (killed / name).read_bytes() == (whole / name).read_bytes()
        assert sorted((killed / "evaluations.jsonl").read_bytes().splitlines()) == sorted(map(bytes.strip, lines))


def test_few_heads_are_chosen_where_they_do_as_well(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path)
    assert origins(tmp_path) == ["identity", *["uniform"] * 4, *["gradient"] * 8]
    winner = outcome.winner
    assert winner is not None and outcome.verdict.recommended
    end = Trail.of(tmp_path).proposals((0.5, 4.0))[0]
    assert n_changed(end) == 16 and n_changed(winner.factors) == 4
    assert {i for i, value in enumerate(numbers_of(winner.factors)) if value != 1.0} >= {4 + 1, 4 + 6, 4 + 11}
    best = CurveFile.load(tmp_path / "best.json")
    assert best.layer_factors is None and best.rows == rows_of(winner.factors)
    assert best == outcome.best


def test_what_is_kept_is_what_was_measured(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path)
    said = read_study(tmp_path)
    assert outcome.winner is not None and said.factors == outcome.winner.factors
    assert said.json() == outcome.summary.json() and said.verdict == outcome.summary.verdict
    assert [point["gain"] for point in said.json()["front"] if point["chosen"]] == [
        point.gain for point in outcome.summary.front.points if point.factors == outcome.winner.factors
    ]
    lines = summary_lines(said)
    low, high = min(numbers_of(outcome.winner.factors)), max(numbers_of(outcome.winner.factors))
    assert f"heads       16 query scales of heads from {low:.4g} to {high:.4g}; 4 differ from 1" in lines
    assert not [line for line in lines if line.startswith("factors")]
    page = Path(write_report(said)).read_text("utf-8")
    assert "16 query scales of heads" in page and "The population over time" not in page
    jobs = [job for job, _ in parse_evaluations((tmp_path / "evaluations.jsonl").read_bytes(), tmp_path)[0]]
    assert len({*jobs}) == len(jobs) and outcome.winner.factors in {job.factors for job in jobs}
    damaged = (tmp_path / "evaluations.jsonl").read_text().replace('"query_scales":[[', '"query_scales":[[-', 1)
    with pytest.raises(LropeError, match="is damaged"):
        parse_evaluations(damaged.encode(), tmp_path)


def test_pruning_keeps_what_moves_most() -> None:
    end = scaled(np.linspace(-0.4, 0.35, 16))
    assert numbers_of(with_numbers(end, numbers_of(end))) == numbers_of(end)
    for share, n in ((1.0, 15), (0.5, 8), (0.25, 4), (0.01, 1)):
        kept = pruned(end, share)
        logs, all_logs = (np.abs(np.log(numbers_of(factors))) for factors in (kept, end))
        assert n_changed(kept) == n or share == 1.0
        assert logs[logs > 0.0].min() >= all_logs[logs == 0.0].max() and rows_of(kept).keys() == {"query_scales"}


def test_bounds_are_for_positions(tmp_path: Path) -> None:
    rows = ((0.6,), (0.5, 1.4))
    step = {"number": 1, "gains": {"kv": 0.0}, "divergence": 0.0, "n_tokens": 1, "seconds": 0.1, "factors": [1.0, 1.0],
            "state": {}, "head_factors": rows, "query_scales": rows}  # fmt: skip
    (tmp_path / NAME).write_text(json.dumps(step) + "\n")
    end = Trail.of(tmp_path).proposals((0.8, 1.25))[0]
    assert end == Tuned((1.0, 1.0), ((0.8,), (0.8, 1.25)), rows)
    (tmp_path / NAME).write_text(json.dumps(step | {"query_scales": [[0.0], [1.0, 1.0]]}) + "\n")
    with pytest.raises(LropeError, match=r"step 1 is damaged"):
        Trail.of(tmp_path)


def test_a_lead_is_a_paired_difference_by_contexts() -> None:
    def scores(values: list[float], task: str) -> list[ContextScore]:
        probe = [(ProbeScore(0.5, value, 0.0),) for value in values]
        return [ContextScore("validation", i, p, 1, 0.0, task) for i, p in enumerate(probe)]

    one, other = scores([1.0, 2.0, 4.0], "a"), scores([0.5, 1.0, 2.5], "a")
    lead, error = Objective(other, scales={"a": 2.0}).lead(one, other)
    differences = np.array([0.5, 1.0, 1.5]) / 2.0
    assert (lead, error) == pytest.approx((differences.mean(), differences.std(ddof=1) / math.sqrt(3)))
    more, more_other = scores([3.0, 3.0], "b"), scores([2.0, 0.0], "b")
    lead, error = Objective(other, weights={"b": 3.0}).lead([*one, *more], [*other, *more_other])
    spread = np.array([np.var([0.5, 1.0, 1.5], ddof=1) / 3, np.var([1.0, 3.0], ddof=1) / 2])
    assert (lead, error) == pytest.approx((0.25 * 1.0 + 0.75 * 2.0, math.sqrt(np.array([1, 9]) / 16 @ spread)))
    assert Objective(other).lead(one[:1], other[:1])[1] == math.inf


def test_a_list_is_asked_for_in_its_order() -> None:
    algorithm = Listed([(None, (1.0,), "identity"), (None, Tuned((1.0,), None, ((2.0,),)), "gradient"),
                        (None, (1.0,), "uniform")])  # fmt: skip
    first, second = algorithm.ask(), algorithm.ask()
    assert first is not None and second is not None and (first.origin, second.origin) == ("identity", "gradient")
    assert algorithm.lag == 2 and algorithm.ask() is None and algorithm.should_stop()
    with pytest.raises(ValueError, match="not the next one"):
        algorithm.tell(second, (1, 0.0))
    algorithm.tell(first, (1, 0.0))
    algorithm.tell(second, (1, 0.0))


class Recorder:
    """Of a `Model`, what `Tuner` calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.calls.append((name, value))


def test_heads_are_set_and_set_back(tmp_path: Path) -> None:
    path = write_readable(tmp_path / "m.gguf")
    tune, model, rows = Tuner(path), Recorder(), ((1.5,), (1.0, 0.5))
    for factors in (ONES, Tuned(ONES, None, rows), Tuned(ONES, rows), ONES):
        tune(cast(Model, model), factors)
    plain, off = ("set_factors", ONES), ("set_query_scales", None)
    assert model.calls == [plain, plain, ("set_query_scales", rows), ("set_head_factors", rows), off, plain, off]


def test_the_base_model_is_without_what_the_file_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = SimpleNamespace(query_scales=((2.0,), (), (3.0, 1.0)))
    monkeypatch.setattr("lrope_search.evaluation.tuning.read_model", lambda path: kept)
    model = Recorder()
    Tuner(Path("m.gguf"))(cast(Model, model), ONES)
    assert model.calls == [("set_factors", ONES), ("set_query_scales", ((1.0,), (), (1.0, 1.0)))]


CHOICES: list[tuple[dict[str, Any], bool, str, str]] = [
    # settings, whether torch is there, the method or an error, the line
    ({}, True, "gradient", ""),
    ({"method": "both"}, True, "gradient", "no genetic search, which knows factors of layers alone"),
    ({"method": "genetic"}, True, "--set scale=heads: only derivatives scale heads; give --method gradient", ""),
    ({}, False, "--set scale=heads: needs derivatives: gradients need", ""),
]


@pytest.mark.parametrize(("given", "there", "found", "told"), CHOICES)
def test_heads_are_searched_by_derivatives(
    given: dict[str, Any], there: bool, found: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        monkeypatch.setattr(climbing, "check_installed", lambda: None)
    settings = SearchConfig(**given, scale="heads")
    if found.startswith("--"):
        with pytest.raises(LropeError, match=f"^{found}"):
            launch._with_method(settings, None)
        return
    settings, line = launch._with_method(settings, None)
    assert (settings.method, line or "") == (found, told) and settings.identity()["scale"] == "heads"
    assert "scale" not in replace(settings, scale="layers").identity()


def lacking(*_: object) -> None:
    raise LropeError("query scales: this library lacks them")


@pytest.mark.native
def test_a_library_without_them_is_said_before_anything_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(climbing, "check_installed", lambda: None)
    monkeypatch.setattr(Model, "set_query_scales", lacking)
    path = write_readable(tmp_path / "m.gguf")
    with pytest.raises(LropeError, match=r"^query scales: this library lacks them$"):
        search(ModelConfig(str(path), n_threads=1), task_config("kv", keys=6), SETTINGS, tmp_path / "s", progress=False)
    assert not (tmp_path / "s").exists()
    info = read_model(path)
    both = launch._neutral(info, "both")
    assert rows_of(both).keys() == {"head_factors", "query_scales"} and n_changed(both) == 0
    assert info.n_head_kv is not None and [*map(len, rows_of(both)["head_factors"])] == [*info.n_head_kv]
    with pytest.raises(LropeError, match=r"^--set scale=heads: .* uses MLA"):
        launch._neutral(replace(info, without_head_factors="uses MLA"), "heads")


@pytest.mark.native
def test_a_curve_file_of_heads_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, curve = write_readable(tmp_path / "m.gguf"), tmp_path / "c.json"
    info = read_model(path)
    assert info.n_head is not None and info.n_layer is not None
    rows = tuple((1.5,) * n for n in info.n_head)
    curve.write_text(json.dumps({"format": "lrope-curve", "version": 1, "query_scales": rows}))
    command = ["eval", str(path), "--keys", "6", "--set", "kv.probes=2", "--set", "kv.identifiers=number",
               "--contexts", "2", "--threads", "1", "--json", "--curve", str(curve)]  # fmt: skip
    assert main([*command, "--study", str(tmp_path / "s")]) == 0
    assert json.loads(capsys.readouterr().out)["heads"] == {"curve": {"query_scales": [*map(list, rows)]}}
    kept = [json.loads(line) for line in (tmp_path / "s" / "evaluations.jsonl").read_text().splitlines()]
    assert [line.get("query_scales") for line in kept] == [None, [*map(list, rows)]] * 2
    assert kept[0]["probes"] != kept[1]["probes"]
    monkeypatch.setattr(Model, "set_query_scales", lacking)
    assert main(command) == 1
    assert capsys.readouterr().err.endswith("lrope-gguf: query scales: this library lacks them\n")


@pytest.mark.native
@pytest.mark.gradient
def test_derivatives_of_heads_are_followed_and_kept(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = write_readable(tmp_path / "m.gguf")
    model, task = ModelConfig(str(path), n_threads=1), task_config("kv", keys=6, probes=3)
    settings = replace(TINY, method="gradient", scale="both", uniform_factors=(1.2,))
    search(model, task, settings, tmp_path / "whole", progress=False)
    Path(tmp_path / "cut").mkdir()
    for name in ("config.json", "guard.json", NAME):
        content = (tmp_path / "whole" / name).read_bytes()
        kept = content.splitlines(keepends=True)[0] if name == NAME else content
        (tmp_path / "cut" / name).write_bytes(kept)
    search(model, task, settings, tmp_path / "cut", progress=False)
    steps = [Trail.of(tmp_path / name).steps for name in ("whole", "cut")]
    assert [step["state"] for step in steps[0]] == [step["state"] for step in steps[1]]
    keys = {"head_factors", "query_scales"}
    end = Trail.of(tmp_path / "cut").proposals((0.5, 4.0))[0]
    assert rows_of(end).keys() == keys and n_changed(end) > 0
    names = [(tmp_path / name / "candidates.jsonl").read_bytes() for name in ("whole", "cut")]
    assert names[0] == names[1] and b"gradient" in names[0]


@pytest.mark.native
@pytest.mark.gradient
def test_a_search_of_heads_goes_on_from_an_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    path, start = write_readable(tmp_path / "m.gguf"), tmp_path / "start.json"
    info = read_model(path)
    assert info.n_head is not None and info.n_layer is not None
    rows = tuple((1.25,) * n for n in info.n_head)
    command = ["search", str(path), "--keys", "6", "--set", "kv.probes=3", "--threads", "1", "--start", str(start),
               "--method", "gradient", "--set", "scale=queries", "--set", "gradient_steps=2", "--max-kl", "100",
               "--set", "search_contexts=2", "--set", "validation_contexts=1", "--set", "test_contexts=2",
               "--output", str(tmp_path / "best.json")]  # fmt: skip
    start.write_text(json.dumps({"format": "lrope-curve", "version": 1, "query_scales": rows[:-1]}))
    assert main(command) == 1
    assert "--start: " in capsys.readouterr().err and not (tmp_path / "best.study").exists()
    start.write_text(json.dumps({"format": "lrope-curve", "version": 1, "query_scales": rows}))
    assert main(command) in (0, 3)
    lines = (tmp_path / "best.study" / "candidates.jsonl").read_text().splitlines()
    found = {one["origin"]: one.get("query_scales") for one in map(json.loads, lines)}
    assert found["seed"] == [*map(list, rows)] and found["identity"] is None and "gradient" in found
    ends = Trail.of(tmp_path / "best.study").proposals((0.5, 4.0))
    moved = [value for row in rows_of(ends[0])["query_scales"] for value in row]
    assert moved and all(abs(value - 1.25) < 0.25 for value in moved)


def test_tuned_is_made_of_what_a_file_has() -> None:
    assert tuned([1.0], {}) == (1.0,) and not isinstance(tuned([1.0], {"query_scales": None}), Tuned)
    rows: Any = [[1.0, 2.0]]
    assert tuned([1.0], {"query_scales": rows}) == Tuned((1.0,), None, ((1.0, 2.0),))
