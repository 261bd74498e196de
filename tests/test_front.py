"""Gain against KL on ordinary text: the front by its definition, who is chosen on it, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.synthetic import Landscape
from test_search_driver import Recorder, search

from lrope_search import SearchConfig
from lrope_search.report.page import write_report
from lrope_search.report.pictures import draw_pictures
from lrope_search.report.reading import read_study
from lrope_search.report.text import front_rows, summary_lines
from lrope_search.results.front import Front, FrontPoint
from lrope_search.scores import GUARD, DivergenceScore
from lrope_search.study.conclude import SearchOutcome
from lrope_search.study.plan import planned_evaluations

SETTINGS = SearchConfig(seed=3, max_evaluations=60, search_contexts=2, validation_contexts=4, test_contexts=12)


class Sensitive(Landscape):
    """Ordinary text suffers by the squares of what the factors differ from 1; finite below ``limit``."""

    limit = math.inf

    def divergence(self, factors: tuple[float, ...]) -> DivergenceScore:
        kl = 30.0 * math.fsum(math.log(s) ** 2 for s in factors) / len(factors)
        return DivergenceScore(0.6 * kl, kl if kl < self.limit else math.nan, 512, 0.0)


gains, numbers = st.sampled_from([-math.inf, -0.1, 0.0, 0.1, 0.2]), st.sampled_from([0.0, 0.1, 0.2, 0.3, math.inf])
points = st.lists(st.builds(FrontPoint, st.just((1.1,)), gains, numbers, numbers))


@given(points, st.sampled_from([0.0, 0.1, 0.25, math.inf]))
def test_the_front_is_its_definition(points: list[FrontPoint], limit: float) -> None:
    front = Front.of(points, limit)
    sides = {(p.gain, p.kl) for p in points if math.isfinite(p.kl)}

    def equalled(gain: float, kl: float) -> bool:
        return any(g >= gain and k <= kl and (g, k) != (gain, kl) for g, k in sides | {(0.0, 0.0)})

    assert {(p.gain, p.kl) for p in front.best} == {side for side in sides - {(0.0, 0.0)} if not equalled(*side)}
    assert [p.kl for p in front.best] == sorted(p.kl for p in front.best)
    within = [p.gain for p in points if p.kl <= limit and math.isfinite(p.kl) and p.gain > 0.0]
    assert (front.choice.gain if front.choice else None) == max(within, default=None)
    least = front.choice.gain if front.choice else 0.0
    assert {p.gain for p in front.passed_over} == {p.gain for p in points if p.gain > least and not p.kl <= limit}
    json.dumps(front.json(), allow_nan=False)


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchOutcome]:
    """A search that any KL is right for."""
    directory = tmp_path_factory.mktemp("front")
    return directory, search(directory, Sensitive(), dataclasses.replace(SETTINGS, max_kl=9.0), guard_contexts=1)


def test_some_nearer_to_the_base_model_are_measured_too(free: tuple[Path, SearchOutcome]) -> None:
    directory, outcome = free
    summary = read_study(directory)
    assert summary.front == outcome.summary.front
    fitness = {candidate.factors: score[1] for candidate, score in outcome.candidates}
    front = {point.factors for point in summary.front.points}
    distance = {factors: sum(math.log(s) ** 2 for s in factors) for factors in fitness}
    for part in (0.75, 0.5):
        reached = [factors for factors, value in fitness.items() if value >= part * max(fitness.values())]
        assert min(reached, key=lambda factors: distance[factors]) in front
    assert len(front) <= SETTINGS.finalists + 1 + 2
    planned = planned_evaluations(SETTINGS, guard=True)
    assert planned["guard"] == SETTINGS.finalists + 1 + 2
    assert planned["validation"] == (planned["guard"] + 1) * SETTINGS.validation_contexts


def test_the_limit_chooses_on_the_front(free: tuple[Path, SearchOutcome], tmp_path: Path) -> None:
    """Tighter and tighter: each choice is the best within the limit, and gains less than the one before."""
    directory, outcome = free
    assert outcome.winner is not None
    front, gains = read_study(directory).front, []
    assert front.choice is not None and front.choice.factors == outcome.winner.factors == front.best[-1].factors
    for i, limit in enumerate([*(point.kl for point in reversed(front.best)), 0.3 * front.best[0].kl]):
        recorder = Recorder(Sensitive())
        settings = dataclasses.replace(SETTINGS, max_kl=limit)
        found = search(tmp_path / str(i), recorder, settings, guard_contexts=1)
        seen = found.summary.front
        assert {job.factors for job in recorder.jobs if job.split == GUARD} == {point.factors for point in seen.points}
        if found.winner is None:
            assert seen.choice is None and f"by more than {limit:g} nats" in found.verdict.text
            continue
        assert seen.choice is not None and seen.choice.factors == found.winner.factors and seen.choice.kl <= limit
        assert found.best.provenance["results"]["guard"]["passed_over"] == len(seen.passed_over)
        gains.append(seen.choice.gain)
        said = "is rejected: its KL divergence on ordinary text" in (tmp_path / str(i) / "log.txt").read_text()
        assert said == bool(seen.passed_over)
    assert len(gains) >= 2 and gains == sorted(gains, reverse=True)


@pytest.mark.pictures
def test_it_is_shown_in_text_and_picture(free: tuple[Path, SearchOutcome], tmp_path: Path) -> None:
    directory, outcome = free
    assert outcome.winner is not None
    summary = read_study(directory)
    head, *rows = front_rows(summary)
    assert head == ["candidate", "origin", "gain, nats", "KL, short", "KL, long", ""]
    assert len(rows) == len(summary.front.points)
    chosen = [row for row in rows if "chosen" in row[-1]]
    assert [row[0] for row in chosen] == [str(outcome.winner.id)] and "front" in chosen[0][-1]
    said = "\n".join(summary_lines(summary))
    assert re.search(rf"^{outcome.winner.id} .* chosen", said, re.M)
    assert re.search(r"^KL, long +\S+ nats a token", said, re.M)
    assert "\ngain on validation contexts against KL on ordinary text, nats a token; --max-kl 9\n" in said
    assert "front" in draw_pictures(summary)
    page = write_report(summary, tmp_path / "page.html")
    assert (tmp_path / "page-front.png").stat().st_size > 5000
    text = page.read_text()
    assert 'id="front"' in text and f'<th scope="row">{outcome.winner.id}</th>' in text
    assert sum(point["front"] for point in summary.json()["front"]) == len(summary.front.best)


@pytest.mark.pictures
def test_kl_that_is_no_number(tmp_path: Path) -> None:
    class Broken(Sensitive):
        limit = 0.01

    outcome = search(tmp_path, Broken(), dataclasses.replace(SETTINGS, max_kl=9.0), guard_contexts=1)
    summary = read_study(tmp_path)
    assert any(point.kl == math.inf for point in summary.front.points)
    if outcome.winner is not None:
        assert summary.guard["long"] < 0.01
    write_report(summary)
    json.loads((tmp_path / "best.json").read_text(), parse_constant=pytest.fail)
    assert any(row[4] == "inf" and row[5] == "over --max-kl" for row in front_rows(summary))
