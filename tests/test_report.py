"""The report of a study: any study, whole, unfinished or damaged, always the same bytes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import sys
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.study_fixtures import CONFIG, SETTINGS, Timed, make_study
from support.synthetic import Landscape

from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_gguf.plot import PlotUnavailableError
from lrope_search.report import pictures as pictures_module
from lrope_search.report.page import page_text, write_report
from lrope_search.report.pictures import draw_pictures
from lrope_search.report.reading import read_study
from lrope_search.report.text import scan_words, summary_lines
from lrope_search.report.tracking import log_study
from lrope_search.results import table
from lrope_search.results.comparison import Comparison, compare
from lrope_search.results.intervals import wilson
from lrope_search.results.summary import LayerEffect, StudySummary
from lrope_search.results.table import depth_table
from lrope_search.scores import ContextScore, Job
from lrope_search.study.conclude import SearchOutcome
from lrope_search.study.store import parse_evaluations

SMALL = dataclasses.replace(SETTINGS, max_evaluations=20, search_contexts=2, validation_contexts=2, test_contexts=8)
VOID = ("meta", "br", "img", "link")
PICTURES = ["accuracy", "cost", "factors", "fitness", "population"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchOutcome]:
    directory = tmp_path_factory.mktemp("whole") / "best.study"
    return directory, make_study(directory)


@pytest.fixture
def copy(whole: tuple[Path, SearchOutcome], tmp_path: Path) -> Path:
    shutil.copytree(whole[0], tmp_path / "copy", ignore=shutil.ignore_patterns("report*"))
    return tmp_path / "copy"


def cut(study: Path, lines: int, rest: bytes = b"") -> None:
    """Leave the first ``lines`` evaluations, and no verdict."""
    path = study / "evaluations.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]) + rest)
    (study / "candidates.jsonl").unlink()
    best = json.loads((study / "best.json").read_text())
    best["provenance"]["results"] = {"search": {"contexts": 4, "fitness": 0.01}}
    (study / "best.json").write_text(json.dumps(best))


class _Text(HTMLParser):
    """The text of a page, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.links, self.open = "", [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in VOID else [tag]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]

    def handle_endtag(self, tag: str) -> None:  # of <tag/> too
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: Path) -> str:
    """The page's text; every element is closed in order and nothing outside is named."""
    source = page.read_text(encoding="utf-8")
    parser = _Text()
    parser.feed(source)
    assert parser.open == [] and all(link.startswith("#") for link in parser.links)
    assert "url(http" not in source and "@import" not in source
    return re.sub(r"\s+", " ", parser.text)


def pictures(page: Path) -> list[str]:
    return sorted(re.findall(r'<figure class="card" id="(\w+)"', page.read_text(encoding="utf-8")))


@pytest.mark.pictures
def test_a_finished_study(whole: tuple[Path, SearchOutcome]) -> None:
    study, outcome = whole
    page = write_report(read_study(study))
    assert page == study / "report.html" and pictures(page) == PICTURES
    assert [path.name for path in sorted(study.glob("*.png"))] == [f"report-{name}.png" for name in PICTURES]
    text = read(page)
    sentence = outcome.verdict.text
    assert outcome.verdict.recommended and sentence[1:] in text
    assert "Recommended" in text and "lrope-gguf write MODEL --curve best.json" in text
    assert "Landscape 24 layers" in text and "search.racing_fraction" in text
    assert page.stat().st_size < 400_000


def test_the_summary_is_what_was_measured(whole: tuple[Path, SearchOutcome]) -> None:
    study, outcome = whole
    summary = read_study(study)
    assert outcome.winner is not None and outcome.uniform is not None
    assert summary == outcome.summary
    assert summary.factors == outcome.winner.factors and summary.uniform.factors == outcome.uniform.factors
    results = dict(parse_evaluations((study / "evaluations.jsonl").read_bytes(), study)[0])
    factors = {
        "base": (1.0,) * 24, f"uniform {outcome.uniform.factors[0]:g}": outcome.uniform.factors,
        "curve": outcome.winner.factors,
    }  # fmt: skip
    sides = {
        name: [results[Job(side, "test", i)] for i in range(SETTINGS.test_contexts)] for name, side in factors.items()
    }
    assert summary.table == depth_table(sides, seed=SETTINGS.seed, confidence=SETTINGS.confidence, over=True)
    trials = {trial.factors: (trial.contexts, trial.fitness) for trial in summary.trials}
    assert trials == {candidate.factors: score for candidate, score in outcome.candidates}
    seen = sorted(outcome.candidates, key=lambda item: item[0].id)
    whole_scores = [fitness if contexts == SETTINGS.search_contexts else 0.0 for _, (contexts, fitness) in seen]
    assert summary.best_so_far() == [max(0.0, *whole_scores[: i + 1]) for i in range(len(seen))]
    lines = [json.loads(line) for line in (study / "evaluations.jsonl").read_text().splitlines()]
    assert summary.total.evaluations == len(lines) and summary.total.tokens == sum(r["n_tokens"] for r in lines)
    assert [cost.phase for cost in summary.costs] == [
        "search, first context", "search, further contexts", "validation", "test"
    ]  # fmt: skip
    assert 240 < summary.total.rate < 280


def test_each_pair_of_sides_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a search with its report, and by `report` with page, JSON and MLflow."""
    calls: list[str] = []

    def counted(*args: Any, **options: Any) -> Comparison:
        calls.append("compare")
        return compare(*args, **options)

    monkeypatch.setattr(table, "compare", counted)
    summary = make_study(tmp_path, SMALL).summary
    write_report(summary)
    assert "curve" in str(summary.table) and summary.json()
    assert len(calls) == 3  # base and uniform, base and curve, uniform and curve
    calls.clear()
    assert main(["report", str(tmp_path)]) == 0
    assert len(calls) == 3


@pytest.mark.pictures
def test_a_picture_draws_the_interval_of_the_questions_of_each_depth(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the contexts, as if each had one question: tests/test_statistics.py has these intervals."""
    bars: list[Any] = []
    monkeypatch.setattr(pictures_module, "_whiskers", lambda axes, look, x, rows: bars.append(np.asarray(rows)))
    study = read_study(copy)
    draw_pictures(dataclasses.replace(study, trials=(), costs=()))
    assert study.table is not None
    cells = [[(c.accuracy, c.interval.low, c.interval.high) for c in side] for side in study.table.cells.values()]
    np.testing.assert_allclose(bars[0], 100.0 * np.array(cells[0]))


def test_old_studies_list_no_factors(copy: Path) -> None:
    with_factors = read_study(copy)
    document = json.loads((copy / "best.json").read_text())
    assert tuple(document.pop("layer_factors")) == with_factors.factors
    (copy / "best.json").write_text(json.dumps(document))
    assert read_study(copy) == with_factors


def test_numbers_of_heads_are_kept(copy: Path) -> None:
    without = read_study(copy)
    document = json.loads((copy / "best.json").read_text())
    document["query_scales"] = [[1.25, 0.75]] * document["block_count"]
    (copy / "best.json").write_text(json.dumps(document))
    found = read_study(copy)
    assert found.best is not None and found.best.query_scales == ((1.25, 0.75),) * document["block_count"]
    assert found.trials == without.trials
    for name in ("layer_factors", "control_points", "bounds"):
        del document[name]
    (copy / "best.json").write_text(json.dumps(document))
    alone = read_study(copy)
    assert alone.best is not None and alone.best.rows and set(alone.factors or ()) == {1.0}
    assert main(["report", str(copy)]) == 0


@pytest.mark.pictures
def test_a_uniform_factor_of_some_layers_is_that_of_these_layers(tmp_path: Path) -> None:
    """Its factors are carried from the search to the report; older records, which hold one number, get them back."""
    outcome = make_study(tmp_path, dataclasses.replace(SMALL, parametrization="layers"), n_layer=6, layers=(1, 4))
    assert outcome.uniform is not None
    factor, factors = outcome.uniform.factors[1], outcome.uniform.factors
    assert factors == (1.0, factor, 1.0, 1.0, factor, 1.0)
    summary = read_study(tmp_path)
    assert summary == outcome.summary and summary.uniform is not None
    assert summary.uniform.factors == factors and "(2 of 6 layers)" in summary.verdict
    assert summary.table is not None and f"uniform {factor:g}" in summary.table.comparisons
    document = json.loads((tmp_path / "best.json").read_text())
    results = document["provenance"]["results"]
    assert results["best_uniform"].pop("factors") == list(factors)
    older = [results.pop("look"), results["test"].pop("accuracy_gain")]
    results["test"]["accuracy_gain"] = [older[1][0], older[1][0], older[1][0]]  # as of old: no width
    (tmp_path / "best.json").write_text(json.dumps(document))
    (tmp_path / "looks.jsonl").unlink()
    again = read_study(tmp_path)
    assert again.uniform == summary.uniform and again.table is not None and summary.table is not None
    assert again.table.comparisons == summary.table.comparisons and again.verdict == summary.verdict
    assert f"uniform {factor:g}" in str(again.table) and "factors" in draw_pictures(again)


def test_without_candidates_the_evaluations_tell_the_same(whole: tuple[Path, SearchOutcome], copy: Path) -> None:
    with_file = read_study(copy)
    (copy / "candidates.jsonl").unlink()
    without = read_study(copy)

    def scores(study: StudySummary) -> dict[Any, Any]:
        return {trial.factors: (trial.contexts, round(trial.fitness, 12)) for trial in study.trials}

    assert scores(without) == scores(with_file) and len(without.trials) == SETTINGS.max_evaluations
    assert max(without.best_so_far()) == max(with_file.best_so_far())
    assert pictures(write_report(read_study(copy))) == PICTURES


@pytest.mark.pictures
def test_the_same_study_gives_the_same_bytes(whole: tuple[Path, SearchOutcome], copy: Path) -> None:
    first = write_report(read_study(whole[0]))
    second = write_report(read_study(copy))
    assert first.read_bytes() == second.read_bytes()
    for name in PICTURES:
        assert (whole[0] / f"report-{name}.png").read_bytes() == (copy / f"report-{name}.png").read_bytes()


def test_reading_changes_nothing(copy: Path, tmp_path: Path) -> None:
    with (copy / "evaluations.jsonl").open("ab") as file:
        file.write(b'{"factors":[1.0,1.0')  # a search is writing just now
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    write_report(read_study(copy), tmp_path / "elsewhere.html")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert sorted(path.name for path in tmp_path.glob("elsewhere*")) == [
        *(f"elsewhere-{name}.png" for name in PICTURES), "elsewhere.html"
    ]  # fmt: skip


@pytest.mark.parametrize("lines", [0, 5, pytest.param(60, marks=pytest.mark.pictures)])
def test_an_unfinished_study(copy: Path, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    cut(copy, lines, b'{"factors"')
    if lines < 5:
        (copy / "best.json").unlink()
    assert main(["report", str(copy)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nthe search has not ended: \d+ candidates so far, .*; the same command resumes it\n", out)
    text = read(copy / "report.html")
    assert "Not finished" in text and "the same command resumes it" in text and "Recommended" not in text
    assert "write MODEL" not in text
    if lines >= 60:
        assert pictures(copy / "report.html") == PICTURES and "no evidence" in text
        assert "(on the search contexts, on which candidates were chosen: no evidence of a gain)" in out


def test_a_study_killed_before_its_first_result(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert pictures(write_report(read_study(tmp_path))) == []
    assert "0 candidates so far, none better than the base model" in read(tmp_path / "report.html")


TASKS = {"name": "kv+vt", "parts": {"kv": {"name": "kv", "weight": 1.0}, "vt": {"name": "vt", "weight": 2.0}}}


class Two(Timed):
    """Two tasks by turns, of which the second lies in a tenth of the nats."""

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        score = super().evaluate(factors, split, index)
        if index % 2 == 0:
            return dataclasses.replace(score, task="kv")
        probes = tuple(dataclasses.replace(p, log_probability=p.log_probability / 10.0) for p in score.probes)
        return dataclasses.replace(score, task="vt", probes=probes)


def test_what_a_report_says(tmp_path: Path) -> None:
    """Whole, as golden/ has it; ``LROPE_GOLDEN=write`` writes it anew."""
    settings, config = dataclasses.replace(SMALL, test_contexts=16), {"model": "two", "task": TASKS}
    make_study(tmp_path, settings, evaluator=Two(8), config=config)
    said = "\n".join(line.rstrip() for line in summary_lines(read_study(tmp_path))) + "\n"
    path = Path(__file__).parent / "golden" / "report-two-tasks.txt"
    if os.environ.get("LROPE_GOLDEN") == "write":
        path.write_text(said, encoding="utf-8")
    assert said == path.read_text(encoding="utf-8")


@pytest.mark.pictures
def test_nothing_gained(tmp_path: Path) -> None:
    class Flat(Timed):
        def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
            score = super().evaluate((1.0,) * self.n_layer, split, index)
            worse = 0.0 if set(factors) == {1.0} else 0.1
            probes = [dataclasses.replace(p, log_probability=p.log_probability - worse) for p in score.probes]
            return dataclasses.replace(score, probes=tuple(probes))

    make_study(tmp_path, SMALL, evaluator=Flat(6))
    text = read(write_report(read_study(tmp_path)))
    assert "Not recommended" in text and "write MODEL" not in text and "all factors are 1" in text


@pytest.mark.pictures
@pytest.mark.parametrize(("n_layer", "listed"), [(1, True), (128, False)])
def test_any_number_of_layers(n_layer: int, listed: bool, tmp_path: Path) -> None:
    make_study(tmp_path, SMALL, n_layer=n_layer)
    if not listed:
        (tmp_path / "candidates.jsonl").unlink()
    page = write_report(read_study(tmp_path))
    assert pictures(page) == PICTURES
    assert "nan" not in re.sub(r"[^\W_]*nan[^\W_]+", "", read(page))


@pytest.mark.pictures
@pytest.mark.parametrize(("bad", "listed"), [(math.nan, True), (-math.inf, False)])
def test_scores_that_are_not_finite(bad: float, listed: bool, tmp_path: Path) -> None:
    class Broken(Timed):
        def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
            score = super().evaluate(factors, split, index)
            if min(factors) > 1.0:  # the uniform factors above 1 among them, which are tested in the end
                probes = [dataclasses.replace(p, log_probability=bad, correct=False) for p in score.probes]
                score = dataclasses.replace(score, probes=tuple(probes))
            return score

    make_study(tmp_path, SMALL, evaluator=Broken(8))
    if not listed:
        (tmp_path / "candidates.jsonl").unlink()
    summary = read_study(tmp_path)
    assert any(trial.fitness == -math.inf for trial in summary.trials)
    assert pictures(write_report(read_study(tmp_path))) == PICTURES
    assert "not a finite number" in read(tmp_path / "report.html")


@pytest.mark.pictures
def test_thousands_of_candidates_stay_small(copy: Path) -> None:
    lines = (copy / "candidates.jsonl").read_text().splitlines()
    for points in (True, False):
        with (copy / "candidates.jsonl").open("w") as file:
            for i in range(2100):
                record = json.loads(lines[i % len(lines)]) | {"id": i}
                record |= {} if points else {"control_points": None}
                file.write(json.dumps(record) + "\n")
        page = write_report(read_study(copy))
        assert page.stat().st_size < 2_000_000
        assert "of 2100 candidates, evenly chosen" in read(page)


def test_guard(copy: Path) -> None:
    factors = read_study(copy).factors
    with (copy / "evaluations.jsonl").open("a") as file:
        for i, (short, long) in enumerate([(0.002, 0.01), (0.004, 0.03)]):
            record = {"factors": factors, "split": "guard", "index": i, "n_tokens": 256, "seconds": 1.0}
            file.write(json.dumps(record | {"probes": [[0.0, -short, True], [1.0, -long, True]]}) + "\n")
    assert read_study(copy).guard == pytest.approx({"short": 0.003, "long": 0.02})
    assert "KL on ordinary text0.02" in read(write_report(read_study(copy)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "no config.json there; give the directory of a search"),
        ("config.json", "[1]", "is not a JSON object"),
        ("best.json", "{}", '"format" is not'),
        ("evaluations.jsonl", None, "is missing, and the report needs it"),
        ("evaluations.jsonl", "{}\n{}\n", "line 1 is damaged"),
        ("candidates.jsonl", '{"id": 0}\n', "line 1 is damaged; delete the file, which the report can do without"),
    ],
)
def test_damaged(copy: Path, name: str, content: str | None, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / name
    path.unlink() if content is None else path.write_text(content)
    assert main(["report", str(copy)]) == 1
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and str(copy) in err and out == ""
    assert not (copy / "report.html").exists()


def test_two_studies_in_one_file(copy: Path) -> None:
    path = copy / "evaluations.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    other = [1.2345] * len(first["factors"])
    for change in ({"factors": [1.0]}, {"factors": other, "probes": [[0.5, -1.0, True]]}):
        changed = json.dumps(first | change) + "\n"
        path.write_text(path.read_text() + changed)
        with pytest.raises(LropeError, match=r"differ in layers or probes"):
            read_study(copy)
        path.write_text(path.read_text().removesuffix(changed))


def test_free_json_may_be_anything(copy: Path) -> None:
    best = json.loads((copy / "best.json").read_text())
    odd: list[Any] = [[], 3, None, "x", {"results": []}, {"results": {"verdict": 5, "search": 1, "best_uniform": [1]}}]
    for provenance in odd:
        (copy / "best.json").write_text(json.dumps(best | {"provenance": provenance}))
        for config in ({}, {"model": [], "task": None, "search": 7, "versions": "x"}, {"search": {"seed": "a"}}):
            (copy / "config.json").write_text(json.dumps(config))
            study = read_study(copy)
            (copy / "page.html").write_text(page_text(study, {}))
            assert "Not finished" in read(copy / "page.html") and summary_lines(study)


def test_text_and_json(whole: tuple[Path, SearchOutcome], copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(copy)]) == 0
    out = capsys.readouterr().out
    assert whole[1].verdict.text in out
    assert f"next: lrope-gguf write MODEL --curve {copy / 'best.json'}" in out and "report.html: written" in out
    (copy / "report.html").unlink()
    assert main(["report", str(copy), "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document["verdict"] == whole[1].verdict.text and document["finished"] and document["recommended"]
    assert document["accuracy"]["split"] == "test" and document["accuracy"]["contexts"] == SETTINGS.test_contexts
    assert document["cost"][-1]["phase"] == "in all" and not (copy / "report.html").exists()
    assert main(["report", str(copy), "--json", "--output", str(copy / "page.html")]) == 0
    assert json.loads(capsys.readouterr().out) == document and (copy / "page.html").exists()


def test_without_matplotlib(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotUnavailableError, match=r"pip install 'lrope-gguf\[plot\]'"):
        write_report(read_study(copy))
    assert main(["report", str(copy)]) == 0
    out, err = capsys.readouterr()
    assert "unseen contexts" in out and "pip install 'lrope-gguf[plot]'" in err and len(err.splitlines()) == 1
    assert main(["report", str(copy), "--output", str(copy / "x.html")]) == 1
    assert not list(copy.glob("*.html"))


def test_wilson() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = wilson(hits / n, n)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1.0, 16).low == pytest.approx(0.8064, abs=1e-4)


@pytest.mark.pictures
def test_a_landscape_without_cost(tmp_path: Path) -> None:
    make_study(tmp_path, SMALL, evaluator=Landscape(4))  # seconds are 0
    assert pictures(write_report(read_study(tmp_path))) == PICTURES
    assert "tokens/s" not in read(tmp_path / "report.html").split("Cost, in numbers")[0]


@pytest.mark.pictures
def test_the_layer_scan_is_drawn_and_said(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, parametrization="layers", max_evaluations=40)
    outcome = make_study(tmp_path / "scan.study", settings, n_layer=6)
    study = read_study(tmp_path / "scan.study")
    assert study.scan == outcome.summary.scan
    raised = [effect for effect in study.scan if effect.factor > 1.0]
    assert [effect.layers for effect in raised] == [(layer,) for layer in range(6)]
    assert len(study.scan) == 6 + 3  # and the half that moved most, lowered
    by_number = {trial.factors: trial for trial in study.trials}
    for effect in study.scan:
        factors = tuple(effect.factor if layer in effect.layers else 1.0 for layer in range(6))
        assert by_number[factors].fitness == effect.fitness
        assert effect.error > 0.0  # of five questions in each of two contexts
    picture = draw_pictures(study)["scan"]
    assert "alone" in picture.svg and picture.png.startswith(b"\x89PNG")
    text = next(line for line in summary_lines(study) if line.startswith("layer scan"))
    assert "9 candidates with one layer, or one group of a deep model, at another factor; gain beyond two" in text
    assert "The layer scan" in write_report(study, tmp_path / "page.html").read_text()
    best = max(study.scan, key=lambda effect: effect.fitness)
    assert (f"layer {best.layers[0]} at {best.factor:.3g} ({best.fitness:+.4f})" in text) == best.beyond_noise


@pytest.mark.pictures
def test_a_ruined_layer_of_the_scan_is_drawn_too(whole: tuple[Path, SearchOutcome]) -> None:
    effects = (LayerEffect((0, 1), 1.2, 1, -math.inf, math.nan), LayerEffect((2,), 0.9, 1, 0.1, math.nan))
    study = dataclasses.replace(whole[1].summary, scan=effects)
    assert "alone" in draw_pictures(study)["scan"].svg
    assert "loss beyond two standard errors: layers 0 to 1 at 1.2 (-inf)" in scan_words(study)
    assert "gain beyond two standard errors: none" in scan_words(study)  # nothing says how far 0.1 can be trusted


class MlflowException(Exception):  # noqa: N818
    pass


def install(monkeypatch: pytest.MonkeyPatch, broken: bool = False) -> dict[str, Any]:
    """Let there be the part of mlflow that is used, with its limits; returns what will be logged."""
    logged: dict[str, Any] = {"metrics": [], "artifacts": []}

    @contextmanager
    def start_run(run_name: str) -> Any:
        if broken:
            raise MlflowException("server: no answer\nand much more")
        logged["name"] = run_name
        yield SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_batch(run_id: str, metrics: list[Any]) -> None:
        assert run_id == "r1" and len(metrics) <= 1000
        logged["metrics"] += metrics

    parts = {
        "start_run": start_run, "exceptions": SimpleNamespace(MlflowException=MlflowException),
        "log_params": lambda params: logged.update(params=params), "set_tags": lambda tags: logged.update(tags=tags),
        "MlflowClient": lambda: SimpleNamespace(log_batch=log_batch),
        "log_artifact": lambda path: logged["artifacts"].append(Path(path).name),
    }  # fmt: skip
    entities = {"Metric": lambda key, value, timestamp, step: (key, value, timestamp, step)}
    for name, content in (("mlflow", parts), ("mlflow.entities", entities)):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return logged


def test_a_study_is_one_run_of_mlflow(whole: tuple[Path, SearchOutcome], monkeypatch: pytest.MonkeyPatch) -> None:
    logged, study = install(monkeypatch), whole[0]
    write_report(read_study(study))
    assert log_study(read_study(study)) == "r1"
    summary = read_study(study)
    assert logged["name"] == "best.study" and logged["params"]["search.seed"] == "3"
    assert logged["tags"] == {"verdict": summary.verdict, "recommended": summary.recommended}
    fitness = [(value, step) for key, value, _, step in logged["metrics"] if key == "fitness"]
    assert fitness == [(trial.fitness, i) for i, trial in enumerate(summary.trials)]
    assert len(fitness) == SETTINGS.max_evaluations
    assert summary.table is not None
    totals = {key: value for key, value, _, _ in logged["metrics"] if key.startswith("test_accuracy")}
    assert totals["test_accuracy_base"] == summary.table.totals["base"].accuracy
    assert {"best.json", "report.html", "report-factors.png"} <= set(logged["artifacts"])


def test_report_with_mlflow(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch)
    assert main(["report", str(copy), "--json", "--mlflow"]) == 0
    assert "mlflow: run r1" in capsys.readouterr().err
    install(monkeypatch, broken=True)
    assert main(["report", str(copy), "--json", "--mlflow"]) == 1
    assert capsys.readouterr().err == "lrope-gguf: --mlflow: server: no answer\n"
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert main(["report", str(copy), "--json", "--mlflow"]) == 1
    assert "pip install mlflow-skinny" in capsys.readouterr().err
