"""Bootstrap intervals against distributions that are known, and the words of the verdict."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lrope_search.statistics import Comparison, Interval, _interval, compare, contexts_needed, verdict
from lrope_search.types import ContextScore, ProbeScore


def scores(
    log_p: np.ndarray, correct: np.ndarray | None = None, depths: list[float] | None = None
) -> list[ContextScore]:
    """Contexts from arrays of shape (contexts, probes)."""
    correct = np.zeros(log_p.shape, bool) if correct is None else correct
    depths = depths or list(np.linspace(0.0, 1.0, log_p.shape[1]))
    return [
        ContextScore("test", i, tuple(ProbeScore(*p) for p in zip(depths, row, hits, strict=True)), 1, 0.0)
        for i, (row, hits) in enumerate(zip(log_p.tolist(), correct.tolist(), strict=True))
    ]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    covered, trials, truth = 0, 300, 0.3
    for trial in range(trials):
        base = rng.normal(-2.0, 5.0, size=(40, 1))  # much wider than the difference: pairing must remove it
        other = base + truth + rng.exponential(0.5, size=(40, 1)) - 0.5
        gain = compare(scores(base), scores(other), seed=trial, resamples=600).log_probability_gain
        assert gain.high - gain.low < 0.6
        covered += gain.low <= truth <= gain.high
    assert 0.88 < covered / trials < 0.98


def test_probes_of_a_context_are_not_independent_evidence() -> None:
    """Copies of a probe must not make the interval narrower."""
    rng = np.random.default_rng(0)
    base, other = rng.normal(size=(2, 30, 1))
    one = compare(scores(base), scores(other)).log_probability_gain
    many = compare(scores(np.tile(base, 9)), scores(np.tile(other, 9))).log_probability_gain
    assert (many.mean, many.low, many.high) == pytest.approx((one.mean, one.low, one.high))


def test_accuracy_and_depths() -> None:
    base = np.array([[True, False, True]] * 10)
    other = np.array([[True, True, True]] * 6 + [[True, False, True]] * 2 + [[False, False, True]] * 2)
    result = compare(scores(np.zeros(base.shape), base), scores(np.zeros(base.shape), other))
    assert result.n_contexts == 10
    assert result.base_accuracy == pytest.approx(2 / 3)
    assert result.accuracy == pytest.approx(24 / 30)
    assert result.accuracy_gain.mean == pytest.approx(4 / 30)
    first, middle, last = result.by_depth
    assert [row.depth for row in result.by_depth] == [0.0, 0.5, 1.0]
    assert (first.base_accuracy, first.accuracy, first.n_probes) == (1.0, 0.8, 10)
    assert first.accuracy_gain.low < first.accuracy_gain.mean == pytest.approx(-0.2)
    assert middle.accuracy_gain.mean == pytest.approx(0.6) and middle.accuracy_gain.low > 0.0
    assert last.accuracy_gain == Interval(0.0, 0.0, 0.0)


def test_rounding_noise_is_no_gain() -> None:
    """0.3 - 0.1 - 0.2 is no gain, though its floats leave 1e-17 above or below zero."""
    once = np.ones((100, 3))
    for gains in ([0.3, -0.1, -0.2], [-0.3, 0.1, 0.2], [0.1, 0.2, -0.3]):
        interval = _interval(np.array(gains), np.arange(3), once, 0.95)
        assert (interval.low, interval.high) == (0.0, 0.0)


def test_many_depths_are_grouped() -> None:
    depths = list(np.linspace(0.0, 1.0, 50))
    log_p = np.zeros((7, 50))
    result = compare(scores(log_p, depths=depths), scores(log_p + 1.0, depths=depths))
    np.testing.assert_allclose([row.depth for row in result.by_depth], np.linspace(0.0, 1.0, 11))
    assert sum(row.n_probes for row in result.by_depth) == 350
    assert all(row.log_probability_gain.mean == pytest.approx(1.0) for row in result.by_depth)


def test_depths_that_only_some_contexts_have() -> None:
    base = [*scores(np.zeros((3, 1)), depths=[0.0]), ContextScore("test", 3, (ProbeScore(1.0, -1.0, False),), 1, 0.0)]
    result = compare(base, base)
    assert [row.n_probes for row in result.by_depth] == [3, 1]
    assert result.by_depth[1].log_probability_gain == Interval(0.0, 0.0, 0.0)


def test_the_seed_decides() -> None:
    base, other = np.random.default_rng(1).normal(size=(2, 20, 3))
    assert compare(scores(base), scores(other), seed=1) == compare(scores(base), scores(other), seed=1)
    assert compare(scores(base), scores(other), seed=1) != compare(scores(base), scores(other), seed=2)


def test_a_number_that_is_none_makes_no_interval() -> None:
    base, other = np.zeros((2, 8, 2))
    other[3, 1] = math.nan
    result = compare(scores(base), scores(other))
    assert math.isnan(result.log_probability_gain.low)
    assert result.by_depth[0].log_probability_gain == Interval(0.0, 0.0, 0.0)
    other[3, 1] = -math.inf
    assert math.isnan(compare(scores(base), scores(other)).log_probability_gain.mean)
    base[3, 1] = -math.inf
    assert math.isnan(compare(scores(base), scores(other)).by_depth[1].log_probability_gain.mean)


@pytest.mark.parametrize("other", [scores(np.zeros((3, 2)))[::-1], scores(np.zeros((3, 3))), scores(np.zeros((2, 2)))])
def test_different_contexts_are_not_compared(other: list[ContextScore]) -> None:
    with pytest.raises(ValueError):
        compare(scores(np.zeros((3, 2))), other)
    with pytest.raises(ValueError, match="nothing"):
        compare([], [])


def comparison(mean: float, low: float, high: float, n: int = 40) -> Comparison:
    return Comparison(n, 0.95, 0.5, 0.5 + mean, Interval(mean, low, high), Interval(0.1, 0.0, 0.2), ())


def test_verdicts() -> None:
    good = verdict(comparison(0.121, 0.06, 0.183), (1.1, comparison(0.04, -0.01, 0.08)))
    assert good.recommended
    assert good.text == "gain 12.1 points [6.0, 18.3] on 40 unseen contexts; best uniform factor 1.1 gains 4.0"
    none = verdict(comparison(0.02, -0.01, 0.05))
    assert not none.recommended
    assert none.text == "no significant gain, not recommended: gain 2.0 points [-1.0, 5.0] on 40 unseen contexts"
    assert not verdict(comparison(0.02, 0.0, 0.05)).recommended  # an interval that touches zero includes it
    base = verdict(None, (1.1, comparison(0.04, -0.01, 0.08)))
    assert not base.recommended and "not recommended; best uniform factor 1.1 gains 4.0" in base.text
    few = verdict(comparison(0.5, 0.4, 0.6, n=5))
    assert not few.recommended and few.text.startswith("too few contexts to tell, at least 6 are needed")


def test_contexts_needed() -> None:
    for confidence in (0.8, 0.9, 0.95, 0.99):
        n = contexts_needed(confidence)
        assert 2.0 ** (1 - n) <= 1.0 - confidence < 2.0 ** (2 - n)
