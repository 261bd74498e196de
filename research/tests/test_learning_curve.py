"""Two studies' own parts: samples of a pool and their power, and contrasts by depth, on made-up scores."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import learning_curve as curve
import lost_in_the_middle as depth
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lrope_gguf import LropeError
from lrope_search.results.comparison import compare
from lrope_search.results.intervals import Interval
from lrope_search.sample import Components
from lrope_search.scores import ContextScore, Job, ProbeScore
from lrope_search.study.store import Study

ROOT = Path(__file__).parents[2]
STUDY = "qwen2.5-coder-0.5b-100-keys"


def scores_of(
    log_p: NDArray[np.float64], correct: NDArray[np.float64] | None = None, depths: Sequence[float] | None = None
) -> list[ContextScore]:
    """Made-up scores; arrays of shape (contexts, probes)."""
    right = np.zeros_like(log_p) if correct is None else correct
    where = np.linspace(0.0, 1.0, log_p.shape[1]) if depths is None else depths
    return [
        ContextScore("test", i, tuple(map(ProbeScore, where, row.tolist(), hits.tolist())), 1, 1.0)
        for i, (row, hits) in enumerate(zip(log_p, right, strict=True))
    ]


def made_up(
    rng: np.random.Generator, size: tuple[int, int], gain: float, between: float, within: float
) -> list[list[ContextScore]]:
    """A base and a side whose gain is known, in both measures."""
    base = rng.normal(-1.0, 2.0, size)  # differs from question to question: only pairs tell the gain
    differences = gain + between * rng.normal(size=(size[0], 1)) + within * rng.normal(size=size)
    return [scores_of(base), scores_of(base + differences, differences)]


@given(st.integers(1, 40), st.integers(1, 60), st.data())
def test_draws_are_without_replacement_one_from_each_stratum(
    contexts: int, questions: int, data: st.DataObject
) -> None:
    n, m = data.draw(st.integers(1, contexts)), data.draw(st.integers(1, questions))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    which, places = curve.draw(rng, (contexts, questions), n, m)
    assert which.shape == (n, 1) and places.shape == (n, m)
    assert len(set(which.ravel().tolist())) == n and 0 <= which.min() <= which.max() < contexts
    assert (np.diff(places, axis=1) > 0).all()
    edges = np.arange(m + 1) * questions // m
    assert (places >= edges[:-1]).all() and (places < edges[1:]).all()


@pytest.mark.parametrize("size", [(0, 1), (1, 0), (5, 1), (1, 4)])
def test_no_more_can_be_drawn_than_there_is(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="of a pool"):
        curve.draw(np.random.default_rng(0), (4, 3), *size)


def test_pairs_are_of_the_same_questions() -> None:
    base, side = made_up(np.random.default_rng(0), (5, 4), 0.5, 0.0, 1.0)
    gain = curve.gain_over("side", base, side)
    assert gain.differences.shape == (2, 5, 4)
    assert gain.differences[0] == pytest.approx(gain.differences[1])  # made so: the base's are paired away
    for wrong in (side[:4], side[::-1], scores_of(np.zeros((5, 3)))):
        with pytest.raises(LropeError, match="not the same questions"):
            curve.gain_over("side", base, wrong)
    for other in (scores_of(np.full((5, 4), -np.inf)), scores_of(np.zeros((5, 1)))):
        with pytest.raises(LropeError, match="two questions in a context"):
            curve.gain_over("side", base if len(other[0].probes) == 4 else other, other)


def test_intervals_are_those_of_a_comparison() -> None:
    rng = np.random.default_rng(1)
    base, side = made_up(rng, (9, 7), 0.3, 0.2, 1.0)
    whole = compare(base, side)
    found = curve.over_contexts(curve.gain_over("", base, side).differences.mean(axis=2))
    theirs = whole.log_probability_gain  # of accuracy, `compare` also knows how few answers differ
    assert [found[1].mean, found[1].low, found[1].high] == pytest.approx(
        [theirs.mean, theirs.low, theirs.high], abs=1e-9
    )


@pytest.mark.parametrize(
    ("interval", "told"), [((1, 0.1, 2), True), ((-1, -2, -0.1), True), ((0, -1, 1), False), ((1, 0, 2), False),
                           ((math.nan,) * 3, False)]
)  # fmt: skip
def test_what_excludes_zero(interval: tuple[float, float, float], told: bool) -> None:
    assert curve.excludes_zero(Interval(*interval)) is told


def test_a_known_gain_is_seen_as_often_as_the_components_say() -> None:
    """A pool so large that draws are as good as fresh samples."""
    gain = curve.gain_over("side", *made_up(np.random.default_rng(2), (1500, 8), 0.5, 0.4, 2.0))
    assert [one.within for one in gain.varies] == pytest.approx([4.0, 4.0], rel=0.05)
    assert [one.between for one in gain.varies] == pytest.approx([0.16, 0.16], abs=0.06)
    for contexts, questions in ((8, 8), (16, 4), (30, 8)):
        hoped = curve.expected(Components(4.0, 0.16), 0.5, contexts, questions)
        for seen in curve.sampled(gain, contexts, questions, 200, 0):
            assert seen.power == pytest.approx(hoped.power, abs=0.1)
            assert seen.half_width == pytest.approx(hoped.half_width, rel=0.1)
    assert curve.sampled(gain, 8, 8, 10, 0) == curve.sampled(gain, 8, 8, 10, 0)
    assert curve.sampled(gain, 8, 8, 10, 0) != curve.sampled(gain, 8, 8, 10, 1)


def test_what_depth_alone_decides_is_taken_out() -> None:
    rng = np.random.default_rng(6)
    noise = rng.normal(size=(2, 400, 9))
    by_depth, by_context = 5.0 * rng.normal(size=(2, 1, 9)), rng.normal(size=(2, 400, 1))
    assert curve.without_depth(noise + by_depth + by_context) == pytest.approx(np.ones(2), rel=0.05)
    assert curve.without_depth(by_depth + by_context) == pytest.approx(np.zeros(2), abs=1e-9)


def test_nothing_is_seen_of_no_gain_but_in_one_of_twenty() -> None:
    gain = curve.gain_over("side", *made_up(np.random.default_rng(3), (2000, 4), 0.0, 0.0, 1.0))
    assert curve.expected(Components(1.0, 0.0), 0.0, 10, 4).power == pytest.approx(0.05)
    assert all(seen.power < 0.12 for seen in curve.sampled(gain, 10, 4, 300, 0))


@given(st.floats(0.01, 10.0), st.floats(0.0, 3.0), st.floats(0.05, 2.0), st.integers(6, 200), st.integers(1, 60))
def test_more_contexts_and_questions_see_more(
    within: float, between: float, gain: float, contexts: int, questions: int
) -> None:
    varies = Components(within, between)
    one = curve.expected(varies, gain, contexts, questions)
    assert 0.05 - 1e-6 <= one.power <= 1.0 and one.half_width > 0.0
    for other in ((2 * contexts, questions), (contexts, 2 * questions)):
        more = curve.expected(varies, gain, *other)
        assert more.power >= one.power - 1e-6 and more.half_width <= one.half_width + 1e-12
    assert curve.expected(varies, -gain, contexts, questions) == one


def test_the_fewest_contexts_are_the_fewest() -> None:
    varies = Components(25.0, 0.1)
    n = curve.needed(varies, 0.6, 11)
    assert curve.expected(varies, 0.6, n, 11).power >= 0.8 > curve.expected(varies, 0.6, n - 1, 11).power
    assert curve.needed(varies, 100.0, 11) == 6
    assert curve.needed(varies, 0.0, 11) is None
    assert curve.expected(Components(0.0, 0.0), 0.1, 6, 1) == curve.Seen(0.0, 1.0)


@given(st.lists(st.floats(0.2, 5.0), min_size=1, max_size=8), st.floats(0.0, 1.0))
def test_small_gains_lie_on_the_way(target: list[float], share: float) -> None:
    base = (1.0,) * len(target)
    found = curve.towards(base, tuple(target), share)
    assert np.log(found) == pytest.approx(share * np.log(target), abs=1e-9)
    assert curve.towards(tuple(target), tuple(target), share) == pytest.approx(target)


@given(st.integers(10, 300), st.integers(0, 3))
def test_bins_are_ten_and_every_jittered_context_has_its_ends_and_middle(n_places: int, seed: int) -> None:
    from lrope_search.tasks.task import places

    asked = [at for _, at in places("test", seed, n_places, 10, seed, "jittered")]
    assert depth.parts(scores_of(np.zeros((1, 10)), depths=asked)).shape == (3, 2, 1)
    assert depth.bins([k / 10 for k in range(11)]).tolist() == [*range(10), 9]


def test_too_few_questions_have_no_contrast() -> None:
    with pytest.raises(LropeError, match="context 0 asks nothing at an end"):
        depth.parts(scores_of(np.zeros((2, 3)), depths=[0.1, 0.5, 0.9]))


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5))
def test_contrasts_tell_a_u_from_a_slope(start: float, end: float, middle: float) -> None:
    row = np.array([start, 9.0, 9.0, middle, middle, middle, middle, 9.0, 9.0, end])
    scores = scores_of(np.tile(row, (3, 1)), np.tile(row / 10.0, (3, 1)), (np.arange(10) + 0.5) / 10.0)
    found = depth.contrasts(depth.parts(scores))
    wanted = [start - middle, end - middle, (start + end) / 2.0 - middle]
    assert found[:, 1, 0] == pytest.approx(wanted, abs=1e-9)
    assert found[:, 0, 2] == pytest.approx(np.array(wanted) / 10.0, abs=1e-9)
    assert depth.profile(scores)[1] == pytest.approx(row)
    slope = scores_of(np.tile(np.linspace(start, end, 10), (2, 1)), depths=(np.arange(10) + 0.5) / 10.0)
    assert depth.contrasts(depth.parts(slope))[2] == pytest.approx(0.0, abs=1e-9)


def test_rows_of_a_length() -> None:
    rng = np.random.default_rng(4)
    depths = (np.arange(10) + 0.5) / 10.0
    base = rng.normal(-1.0, 0.1, (8, 10)) - 2.0 * np.isin(np.arange(10), range(3, 7))
    right = np.tile([1.0, 1, 1, 0, 0, 0, 0, 1, 1, 1], (8, 1))
    sides = {"base": scores_of(base, right, depths), "curve": scores_of(base + 1.0, np.ones((8, 10)), depths)}
    length = depth.length_of(0.25, 100, sides)
    first, second = depth.rows(length, 0)
    assert first.startswith("| 25 % | 100 | base | 100 | 100 | 100 | 0 | 0 | 0 | 0 | 100 | 100 | 100 | 60.0 |")
    assert first.count("|") == second.count("|") == 3 + 10 + 1 + 3 + 2 + 1
    assert second.endswith("| -100.0 [-100.0, -100.0] | +100.0 [+100.0, +100.0] |")
    log_p = depth.rows(length, 1)[1]
    assert log_p.endswith("| +1.0000 [+1.0000, +1.0000] |")


def test_a_kept_study_has_its_learning_curve(studies: Path) -> None:
    where, scores, pairs = curve.kept(studies / STUDY)
    assert where == str(studies / STUDY) and pairs == [("curve", "base"), ("curve", "uniform 1.05")]
    assert {name: len(side) for name, side in scores.items()} == {"base": 30, "uniform 1.05": 30, "curve": 30}
    gain = curve.gain_over("", scores["base"], scores["curve"])
    assert gain.differences.shape == (2, 30, 11)
    whole = curve.over_contexts(gain.differences.mean(axis=2))[0]
    assert [round(100 * value, 1) for value in (whole.mean, whole.low, whole.high)] == [
        7.6,
        2.1,
        13.0,
    ]  # research/results.md
    lines = list(curve.tables(gain, [(6, 5), (20, 11)], [11, 53], 5, 0))
    assert "- accuracy, 53 questions a context: more than there are, expected 9" in lines
    assert any(line.startswith("| 6 x 5 |") for line in lines) and any(
        line.startswith("| 20 x 11* |") for line in lines
    )


def test_answers_that_eval_kept(tmp_path: Path) -> None:
    """Sides are named by their factors; contexts are those of base and curve, and who saw fewer is left out."""
    sides = {(1.0, 1.0): 4, (1.0, 1.2): 3, (1.1, 1.1): 3, (1.2, 1.2): 2, (0.9, 1.2): 4}
    with Study(tmp_path, {"task": {}, "computing": {}}) as study:
        for factors, n in sides.items():
            for i in range(n):
                probes = (ProbeScore(0.2, -sum(factors) - i, False), ProbeScore(0.7, -1.0, True))
                study.record(Job(factors, "test", i), ContextScore("test", i, probes, 10, 1.0))
        study.record(Job((1.0, 1.0), "search", 0), ContextScore("search", 0, probes, 10, 1.0))
    _, scores, pairs = curve.kept(tmp_path)
    assert pairs == [("curve", name) for name in ("base", "uniform 1.1", "curve 2")]
    assert list(scores) == ["base", "curve", "uniform 1.1", "curve 2"]
    assert all([score.index for score in side] == [0, 1, 2] for side in scores.values())
    assert scores["curve"][1].probes[0].log_probability == -3.2
    assert scores["curve 2"][1].probes[0].log_probability == pytest.approx(-3.1)
    _, scores, _ = curve.kept(tmp_path, 2)
    assert {name: [score.index for score in side] for name, side in scores.items()} == {
        name: [0, 1] for name in ("base", "curve", "uniform 1.1", "uniform 1.2", "curve 2")
    }


@pytest.mark.parametrize("missing", ["config.json", "evaluations.jsonl"])
def test_a_study_without_a_test_is_refused(studies: Path, tmp_path: Path, missing: str) -> None:
    study = tmp_path / "study"
    shutil.copytree(studies / STUDY, study)
    (study / missing).unlink()
    with pytest.raises(LropeError, match="study"):
        curve.kept(study)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["learning_curve.py", "--study", STUDY, "--contexts", "5"], "--contexts 5: too few"),
        (["learning_curve.py", "--study", STUDY, "--contexts", "31"], "the pool has 30 x 11"),
        (["learning_curve.py", "--study", STUDY, "--draws", "0"], "give at least 1"),
        (["learning_curve.py", "--study", "nowhere"], "nowhere: no config.json"),
        (["learning_curve.py"], "give either MODEL or --study"),
        (["lost_in_the_middle.py"], "give either MODEL or --study"),
        (["lost_in_the_middle.py", "--study", STUDY], "needs --window"),
        (["lost_in_the_middle.py", "model.gguf", "--shares", "-1"], "give numbers above 0"),
        (["lost_in_the_middle.py", "model.gguf", "--window", "0"], "give numbers above 0"),
        (["lost_in_the_middle.py", "model.gguf", "--contexts", "0"], "give numbers above 0"),
        (["lost_in_the_middle.py", "model.gguf"], "model.gguf"),
    ],
)
def test_mistakes_are_said_in_a_line(
    studies: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *rest = arguments
    monkeypatch.setattr(sys, "argv", [script, *(str(studies / STUDY) if word == STUDY else word for word in rest)])
    with pytest.raises(SystemExit) as end:
        {"learning_curve.py": curve, "lost_in_the_middle.py": depth}[script].main()
    assert end.value.code not in (0, None)
    assert said in capsys.readouterr().err
