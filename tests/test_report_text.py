"""What `lrope-gguf report` says, whole: one transcript a case, beside which a change of words shows at once.

After a wanted change: ``LROPE_GOLDEN=write pytest tests/test_report_text.py``, and read what git then shows.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from support.study_fixtures import SETTINGS, Timed, make_study

from lrope_search.report.reading import read_study
from lrope_search.report.text import summary_lines
from lrope_search.scores import ContextScore

GOLDEN = Path(__file__).parent / "golden"
SMALL = dataclasses.replace(SETTINGS, max_evaluations=20, search_contexts=2, validation_contexts=2, test_contexts=8)
TASKS = {"name": "kv+vt", "parts": {"kv": {"name": "kv", "weight": 1.0}, "vt": {"name": "vt", "weight": 2.0}}}


class Two(Timed):
    """Two tasks by turns, of which the second lies in a tenth of the nats."""

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        score = super().evaluate(factors, split, index)
        if index % 2 == 0:
            return dataclasses.replace(score, task="kv")
        probes = tuple(dataclasses.replace(p, log_probability=p.log_probability / 10.0) for p in score.probes)
        return dataclasses.replace(score, task="vt", probes=probes)


class Flat(Timed):
    """Nothing that a factor does changes an answer, and all make it a little less likely."""

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        score = super().evaluate((1.0,) * self.n_layer, split, index)
        worse = 0.0 if set(factors) == {1.0} else 0.1
        probes = [dataclasses.replace(p, log_probability=p.log_probability - worse) for p in score.probes]
        return dataclasses.replace(score, probes=tuple(probes))


def gain(directory: Path) -> None:
    make_study(directory, SMALL)


def some_layers(directory: Path) -> None:
    make_study(directory, dataclasses.replace(SMALL, parametrization="layers"), n_layer=6, layers=(1, 4))


def no_gain(directory: Path) -> None:
    make_study(directory, SMALL, evaluator=Flat(6))


def two_tasks(directory: Path) -> None:
    config = {"model": "two", "task": TASKS}
    make_study(directory, dataclasses.replace(SMALL, test_contexts=16), evaluator=Two(8), config=config)


def unfinished(directory: Path) -> None:
    make_study(directory, SMALL)
    best = json.loads((directory / "best.json").read_text())
    best["provenance"]["results"] = {"search": best["provenance"]["results"]["search"]}
    (directory / "best.json").write_text(json.dumps(best))


CASES = (gain, some_layers, no_gain, two_tasks, unfinished)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__.replace("_", "-"))
def test_what_a_report_says(make: object, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path)
    said = "\n".join(line.rstrip() for line in summary_lines(read_study(tmp_path))) + "\n"
    path = GOLDEN / f"report-{request.node.callspec.id}.txt"
    if os.environ.get("LROPE_GOLDEN") == "write":
        path.write_text(said, encoding="utf-8")
    assert said == path.read_text(encoding="utf-8")
