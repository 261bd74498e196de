"""Intervals against distributions that are known, the words of the verdict, and how many questions a search asks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from lrope_search import SearchConfig
from lrope_search.results.comparison import Comparison, compare, contexts_needed
from lrope_search.results.findings import Findings, GuardFinding, Look, Stage, TaskGain, Uniform, looked_again
from lrope_search.results.intervals import (
    Interval,
    Strata,
    answers_interval,
    draws,
    mean_interval,
    share_interval,
    wilson,
)
from lrope_search.results.variation import components, typical, variation_text
from lrope_search.sample import ERRORS, SPREAD, Components, cheapest, default_contexts, default_probes
from lrope_search.scores import ContextScore, ProbeScore


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


@pytest.mark.parametrize("n", [6, 12, 40])
@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_cover_the_truth_as_often_as_they_say(n: int, skewed: bool) -> None:
    """95 % of them, however few the contexts; a skew costs some where there are few."""
    rng = np.random.default_rng(7)
    covered, trials, truth = 0, 400, 0.3
    for trial in range(trials):
        base = rng.normal(-2.0, 5.0, size=(n, 1))  # much wider than the difference: pairing must remove it
        noise = rng.exponential(0.5, size=(n, 1)) - 0.5 if skewed else rng.normal(0.0, 0.5, size=(n, 1))
        gain = compare(scores(base), scores(base + truth + noise), seed=trial, resamples=1000).log_probability_gain
        assert gain.high - gain.low < 5.0
        covered += gain.low <= truth <= gain.high
    least = {6: 0.83, 12: 0.88, 40: 0.90}[n] if skewed else 0.90
    assert least < covered / trials < 0.98


def test_an_answer_of_many_parts_counts_as_many() -> None:
    """Thirty lists of eleven words, of which so many are right, say as much as thirty contexts of eleven words."""
    rng = np.random.default_rng(0)
    one_task, context = Strata(np.zeros(30, np.int_), np.ones(1)), np.arange(30)
    words = rng.choice([1.0, 0.0], (30, 11), p=[0.2, 0.8])
    apart, listed = words.ravel(), words.mean(axis=1)
    counts, found = draws(one_task, 0, 2000), []
    for values, of in ((apart, np.repeat(context, 11)), (listed, context)):
        share = share_interval(values, of, 0.95, one_task)
        gain = answers_interval(values, of, counts, 0.95, one_task)
        found.append((share.low, share.high, gain.low, gain.high))
    assert found[0] == pytest.approx(found[1])


FLIPS = {"none or few": (0.01, 0.01), "few, one way": (0.03, 0.0), "some": (0.1, 0.02), "many": (0.3, 0.05),
         "many, both ways": (0.3, 0.3), "most": (0.6, 0.02)}  # fmt: skip


def covered(n: int, questions: int, flips: tuple[float, float], correlation: float, trials: int) -> tuple[float, float]:
    """How often an interval holds the truth, and how often its lower end lies at or below it.

    Of ``questions`` in each of ``n`` contexts, the shares that turn right and wrong vary between contexts by a
    Dirichlet distribution, so that answers of one context are correlated; what comes of it is known exactly.
    """
    rng = np.random.default_rng([n, questions, int(1000 * correlation)])
    up, down = flips
    shares = np.tile([up, down, 1.0 - up - down], (trials, n, 1))
    if correlation > 0.0:
        shares = rng.dirichlet(np.maximum(shares[0, 0], 1e-9) * (1.0 / correlation - 1.0), size=(trials, n))
    one_task, context = Strata(np.zeros(n, np.int_), np.ones(1)), np.repeat(np.arange(n), questions)
    counts, held, below = draws(one_task, 0, 1000), 0, 0
    for trial in range(trials):
        turned = rng.multinomial(questions, shares[trial] / shares[trial].sum(axis=1, keepdims=True))
        found = answers_interval(
            np.repeat(np.tile([1.0, -1.0, 0.0], n), turned.ravel()), context, counts, 0.95, one_task
        )
        assert found.high > found.low
        held += found.low <= up - down + 1e-12 and up - down - 1e-12 <= found.high
        below += found.low <= up - down + 1e-12
    return held / trials, below / trials


@pytest.mark.parametrize("n", [4, 8, 12])
@pytest.mark.parametrize("questions", [1, 5])
@pytest.mark.parametrize("flips", ["few, one way", "many"])
def test_few_answers_that_differ_are_covered(n: int, questions: int, flips: str) -> None:
    """Where resamples of contexts had no width at all, or too little: totals and rows by depth alike."""
    held, _ = covered(n, questions, FLIPS[flips], 0.1 if questions > 1 else 0.0, trials=150)
    assert held >= 0.93 - 2.0 * math.sqrt(0.95 * 0.05 / 150)


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 6, 8, 12, 40])
@pytest.mark.parametrize("questions", [1, 5, 40])
@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.2])
def test_answers_are_covered_however_few_differ_and_however_they_cluster(
    n: int, questions: int, correlation: float
) -> None:
    """As often as they say, but for three standard errors of the simulation: 0.923 or more, 0.956 of lower ends."""
    if questions == 1 and correlation > 0.0:
        pytest.skip("one question a context cannot be correlated with another")
    for name, flips in FLIPS.items():
        held, below = covered(n, questions, flips, correlation, trials=600)
        assert held >= 0.95 - 3.0 * math.sqrt(0.95 * 0.05 / 600), name
        assert below >= 0.975 - 3.0 * math.sqrt(0.975 * 0.025 / 600), name


@pytest.mark.parametrize(("questions", "wide"), [(1, 0.2775), (60, 0.0423)])
def test_where_no_answer_differs_the_interval_keeps_a_width(questions: int, wide: float) -> None:
    """The rule of three and more: ten times sixty questions count as 87 that know nothing of each other."""
    base = np.full((10, questions), True)
    rng = np.random.default_rng(0)
    log_p = rng.normal(size=(2, 10, questions))
    gain = compare(scores(log_p[0], base), scores(log_p[1], base)).accuracy_gain
    assert (gain.mean, -gain.low, gain.high) == pytest.approx((0.0, wide, wide), abs=1e-4)
    same = compare(scores(log_p[0], base), scores(log_p[0], base))
    assert same.accuracy_gain == same.log_probability_gain == Interval(0.0, 0.0, 0.0)  # the same factors: certain


def test_one_task_with_few_differing_answers_widens_a_mix() -> None:
    """Its part of the interval is by scores, the other's stays what the contexts show: square and add."""
    rng = np.random.default_rng(0)
    tasks = Strata(np.repeat([0, 1], 10), np.ones(2))
    context = np.repeat(np.arange(20), 20)
    turned = np.where(context < 10, rng.choice([1.0, 0.0], context.size), 0.0)
    counts = draws(tasks, 0, 2000)
    mixed = answers_interval(turned, context, counts, 0.95, tasks)
    alone = Strata(np.zeros(10, np.int_), np.ones(1))
    first, second = (
        answers_interval(part, context[:200], counts[:, :10], 0.95, alone) for part in (turned[:200], turned[200:])
    )
    assert second.high > 0.0
    widest = math.hypot(first.high - first.mean, second.high - second.mean) / 2.0
    assert 0.9 * widest < mixed.high - mixed.mean < 1.4 * widest


def test_a_share_by_depth_counts_its_questions_not_its_contexts() -> None:
    """Six contexts of six questions each: 36 questions that know of each other only a little."""
    rng = np.random.default_rng(1)
    context, one_task = np.repeat(np.arange(6), 6), Strata(np.zeros(6, np.int_), np.ones(1))
    found = share_interval(np.where(rng.random(36) < 0.5, 1.0, 0.0), context, 0.95, one_task)
    whole, few = wilson(found.mean, 36), wilson(found.mean, 6)
    assert whole.high - whole.low <= found.high - found.low < 0.6 * (few.high - few.low)
    copies = share_interval(np.repeat([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 6), context, 0.95, one_task)
    assert copies.high - copies.low == pytest.approx(few.high - few.low, rel=0.15)  # as many as there are contexts


def answers(rng: np.random.Generator, n: int, up: float, down: float) -> tuple[list[ContextScore], list[ContextScore]]:
    """Two models on ``n`` contexts of 11 questions: of those the first gets wrong, the second gets ``up`` right."""
    hard = rng.beta(2.0, 2.0, size=(n, 1))  # contexts differ in how hard they are
    base = rng.random((n, 11)) < hard
    chance = rng.random((n, 11))
    other = np.where(base, chance >= down, chance < up)
    zeros = np.zeros((n, 11))
    return scores(zeros, base), scores(zeros, other)


@pytest.mark.parametrize("n", [6, 16, 40])
@pytest.mark.parametrize("change", [0.02, 0.3])
def test_equal_models_are_seldom_called_different(n: int, change: float) -> None:
    """Models that answer as well, though not the same questions: above zero in 2.5 % of all cases, by design."""
    rng = np.random.default_rng(n)
    trials, found = 120, 0
    for trial in range(trials):
        found += compare(*answers(rng, n, change, change), seed=trial, resamples=400).significant
    assert found / trials <= 0.05


@pytest.mark.parametrize(("n", "up", "power"), [(40, 0.2, 0.95), (16, 0.3, 0.9)])
def test_a_real_gain_is_found(n: int, up: float, power: float) -> None:
    rng = np.random.default_rng(3)
    found = [compare(*answers(rng, n, up, 0.02), seed=i, resamples=400).significant for i in range(60)]
    assert np.mean(found) >= power


def test_few_contexts_make_the_interval_students() -> None:
    """Of differences that are normal by their looks, the interval is Student's t."""
    for n in (6, 10, 30):
        differences = stats.norm.ppf((np.arange(n) + 0.5) / n)[:, None]
        gain = compare(scores(0.0 * differences), scores(differences), resamples=100_000).log_probability_gain
        error = float(differences.std(ddof=1)) / math.sqrt(n)
        assert (gain.low, gain.high) == pytest.approx(stats.t.interval(0.95, n - 1, scale=error), abs=0.08)


@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 9), st.just(6))), st.integers(0, 2**32))
def test_a_comparison_turned_round_is_its_negative(hits: np.ndarray, seed: int) -> None:
    base, other = (scores(0.0 - side, side) for side in (hits[:, :3], hits[:, 3:]))
    there, back = compare(base, other, seed=seed, resamples=200), compare(other, base, seed=seed, resamples=200)
    assert there.accuracy_gain.mean == pytest.approx(there.accuracy - there.base_accuracy, abs=1e-12)
    for kind in ("accuracy_gain", "log_probability_gain"):
        gain, loss = getattr(there, kind), getattr(back, kind)
        assert (gain.mean, gain.low, gain.high) == pytest.approx((-loss.mean, -loss.high, -loss.low), abs=1e-9)
        assert gain.low - 1e-9 <= gain.mean <= gain.high + 1e-9 or len(hits) > 1
    assert compare(base, base, seed=seed, resamples=200).accuracy_gain == Interval(0.0, 0.0, 0.0)


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
    assert last.accuracy_gain.mean == 0.0  # no answer differs, which ten questions do not prove of all
    assert (last.accuracy_gain.low, last.accuracy_gain.high) == pytest.approx((-0.2775, 0.2775), abs=1e-4)


def test_rounding_noise_is_no_gain() -> None:
    """0.3 - 0.1 - 0.2 is no gain, though its floats leave 1e-17 above or below zero."""
    once, one_task = np.ones((100, 12)), Strata(np.zeros(12, np.int_), np.ones(1))
    for gains in ([0.3, -0.1, -0.2], [-0.3, 0.1, 0.2], [0.1, 0.2, -0.3]):
        interval = mean_interval(np.array(4 * gains), np.arange(12), once, 0.95, one_task)
        assert (interval.low, interval.high) == (0.0, 0.0)


def test_many_depths_are_grouped() -> None:
    depths = list(np.linspace(0.0, 1.0, 50))
    log_p = np.zeros((7, 50))
    result = compare(scores(log_p, depths=depths), scores(log_p + 1.0, depths=depths))
    np.testing.assert_allclose([row.depth for row in result.by_depth], np.arange(0.05, 1.0, 0.1))
    assert sum(row.n_probes for row in result.by_depth) == 350
    assert result.log_probability_gain.mean == pytest.approx(1.0)


def test_depths_that_only_some_contexts_have() -> None:
    base = [*scores(np.zeros((3, 1)), depths=[0.0]), ContextScore("test", 3, (ProbeScore(1.0, -1.0, False),), 1, 0.0)]
    result = compare(base, base)
    assert [row.n_probes for row in result.by_depth] == [3, 1]
    assert result.by_depth[1].accuracy_gain == result.log_probability_gain == Interval(0.0, 0.0, 0.0)
    base[3] = ContextScore("test", 3, (ProbeScore(1.0, -1.5, False),), 1, 0.0)
    right = replace(base[3], probes=(ProbeScore(1.0, -1.0, True),))
    gain = compare(base, [*base[:3], right]).by_depth[1].accuracy_gain
    assert gain.low < 0.3 < gain.mean == 1.0  # one question of one context


def test_a_number_that_is_none_makes_no_interval() -> None:
    base, other = np.zeros((2, 8, 2))
    other[3, 1] = math.nan
    result = compare(scores(base), scores(other))
    assert math.isnan(result.log_probability_gain.low)
    assert math.isfinite(result.accuracy_gain.low)
    other[3, 1] = -math.inf
    assert math.isnan(compare(scores(base), scores(other)).log_probability_gain.mean)
    base[3, 1] = -math.inf
    assert math.isnan(compare(scores(base), scores(other)).log_probability_gain.mean)


@pytest.mark.parametrize("other", [scores(np.zeros((3, 2)))[::-1], scores(np.zeros((3, 3))), scores(np.zeros((2, 2)))])
def test_different_contexts_are_not_compared(other: list[ContextScore]) -> None:
    with pytest.raises(ValueError):
        compare(scores(np.zeros((3, 2))), other)
    with pytest.raises(ValueError, match="nothing"):
        compare([], [])


def comparison(mean: float, low: float, high: float, n: int = 40) -> Comparison:
    return Comparison(n, 0.95, 0.5, 0.5 + mean, Interval(mean, low, high), Interval(0.1, 0.0, 0.2), ())


GOOD, LITTLE, MAYBE = comparison(0.121, 0.06, 0.183), comparison(0.04, -0.01, 0.08), comparison(0.02, 0.0, 0.05)
UNIFORM, SOME = Uniform(1.1, (1.1,) * 4), Uniform(1.1, (1.0, 1.1, 1.1, 1.0))
CURVE, STAGE, LOOK = (1.0, 1.3, 1.0, 1.0), Stage(4, 0.1), Look(1, range(40), True, 0.95)


def found(gain: Comparison | None, **more: Any) -> Findings:
    return Findings(CURVE, 9, "evaluations", STAGE, STAGE, more.pop("look", LOOK), 0.5, gain, **more)


TWO = {"kv": TaskGain(1.0, GOOD), "mdqa": TaskGain(1.0, comparison(-0.1, -0.2, -0.05))}
VERDICTS = {
    "gain 12.1 points [6.0, 18.3] on 40 unseen contexts": found(GOOD),
    "gain 12.1 points [6.0, 18.3] on 40 unseen contexts; best uniform factor 1.1 gains 4.0": found(
        GOOD, uniform=UNIFORM, uniform_gain=LITTLE
    ),
    "gain 12.1 points [6.0, 18.3] on 40 unseen contexts; best uniform factor 1.1 gains 4.0; 8.1 points [2.0, 14.5] "
    "above it; KL on ordinary text 0.004": found(
        GOOD, uniform=UNIFORM, uniform_gain=LITTLE, over_uniform=comparison(0.081, 0.02, 0.145),
        guard=GuardFinding(0.1, 0, 0.001, 0.00412),
    ),
    "gain 12.1 points [6.0, 18.3] on 40 unseen contexts; best uniform factor 1.1 (2 of 4 layers) gains 4.0; above it "
    "1.0 points [-2.0, 4.0], which may be chance; KL on ordinary text 0.000": found(
        GOOD, uniform=SOME, uniform_gain=LITTLE, over_uniform=comparison(0.01, -0.02, 0.04),
        guard=GuardFinding(0.1, 0, 0.0, 0.0),
    ),
    "gain 12.1 points [6.0, 18.3] on 40 unseen contexts; the winner is the uniform factor 1.1 (2 of 4 layers): "
    "factors that differ between layers gain no more; KL on ordinary text under 0.001": replace(
        found(GOOD, uniform=SOME, uniform_gain=GOOD, guard=GuardFinding(0.1, 2, 3e-5, 0.0)), factors=SOME.factors
    ),
    "gain 12.1 points [6.0, 18.3] on 40 unseen contexts (kv 12.1 points [6.0, 18.3], mdqa -10.0 points [-20.0, -5.0]); "
    "harms mdqa": found(GOOD, tasks=TWO),
    "gain 12.1 points [6.0, 18.3] on 40 unseen contexts (look 2 of this study, intervals at 98.75 %)": found(
        GOOD, look=Look(2, range(40, 80), True, 0.9875)
    ),
    "gain 12.1 points [6.0, 18.3] on 40 contexts (look 3 of this study, at contexts of an earlier look, as the data "
    "has no more; intervals at 99.375 %)": found(GOOD, look=Look(3, range(40), False, 0.99375)),
    "not recommended, the gain may be chance: gain 2.0 points [0.0, 5.0] on 40 unseen contexts": found(MAYBE),
    "not recommended: 5 contexts are too few to tell a gain from chance, at least 6 are needed (--set "
    "test_contexts=N): gain 50.0 points [40.0, 60.0] on 5 unseen contexts": found(comparison(0.5, 0.4, 0.6, n=5)),
    "not recommended: 40 contexts, which count as 5.6 by their weights, are too few to tell a gain from chance, at "
    "least 6 are needed (--set test_contexts=N): gain 12.1 points [6.0, 18.3] on 40 unseen contexts": found(
        replace(GOOD, n_effective=5.6)
    ),
    "not recommended, no gain: gain 0.0 points [-1.5, 1.5] on 40 unseen contexts": found(
        comparison(0.0, -0.015, 0.015)
    ),
    "not recommended: no curve beat the base model on validation; best uniform factor 1.1 gains 4.0": found(
        None, uniform=UNIFORM, uniform_gain=LITTLE
    ),
    "not recommended: every curve that beats the base model on validation changes ordinary text by more than 0.1 nats "
    "a token (--max-kl)": found(None, uniform=UNIFORM, uniform_gain=LITTLE, guard=GuardFinding(0.1, 3)),
}  # fmt: skip


@pytest.mark.parametrize("text", VERDICTS)
def test_verdicts_and_findings_pass_through_json(text: str) -> None:
    record = VERDICTS[text]
    assert (record.verdict.text, record.verdict.recommended) == (text, text.startswith("gain"))
    written = json.loads(json.dumps(record.to_json(), allow_nan=False))
    read = Findings.from_json(written, record.factors, 0.8)
    assert read is not None and read.to_json() == written
    assert (read.uniform, read.look, read.verdict) == (record.uniform, record.look, record.verdict)


def test_findings_of_anything_else_are_none() -> None:
    whole = found(GOOD, uniform=UNIFORM, uniform_gain=LITTLE).to_json()
    assert Findings.from_json(whole, CURVE, 0.95) is not None
    odd = [None, 3, [], "x", {}, {"verdict": 5}, {"verdict": "gain"}]
    odd += [{name: value for name, value in whole.items() if name != left_out} for left_out in ("test", "search")]
    odd += [
        whole | {name: wrong} for name in ("test", "best_uniform", "look", "candidates") for wrong in ("x", [1], {})
    ]
    for value in odd:
        assert Findings.from_json(value, CURVE, 0.95) is None


def test_a_look_again_errs_half_as_often() -> None:
    assert looked_again(0.95, 1) == 0.95
    levels = [1.0 - looked_again(0.95, number) for number in range(1, 40)]
    assert levels[1] == pytest.approx(0.05 / 4) and sum(levels) == pytest.approx(1.5 * 0.05)


def test_contexts_needed() -> None:
    for confidence in (0.8, 0.9, 0.95, 0.99):
        n = contexts_needed(confidence)
        assert 2.0 ** (1 - n) <= 1.0 - confidence < 2.0 ** (2 - n)


def scored(rows: Sequence[Sequence[float]]) -> list[ContextScore]:
    return [
        ContextScore("search", i, tuple(ProbeScore(k / 9, float(v), False) for k, v in enumerate(row)), 1, 1.0)
        for i, row in enumerate(rows)
    ]


@given(
    st.floats(0.01, 10.0), st.floats(0.0, 1.0), st.floats(0.05, 2.0), st.integers(1, 60),
    st.floats(1.0, 1e4), st.floats(0.1, 100.0), st.integers(1, 8),
)  # fmt: skip
def test_the_sample_is_the_cheapest_that_is_good_enough(
    within: float, between: float, error: float, places: int, context: float, probe: float, least: int
) -> None:
    found = Components(within, between)
    contexts, probes = cheapest(found, error, places=places, context_cost=context, probe_cost=probe, least=least)
    assert least <= contexts and 1 <= probes <= places
    assert found.standard_error(contexts, probes) <= error * (1 + 1e-6)
    cost = contexts * (context + probes * probe)
    for n in range(1, places + 1):  # nothing cheaper is good enough
        most = math.ceil(cost * (1 - 1e-9) / (context + n * probe)) - 1  # contexts of n probes that cost less
        assert most < least or found.standard_error(most, n) > error * (1 - 1e-6)


@given(st.integers(1, 2000))
def test_the_defaults_see_a_gain_worth_finding(places: int) -> None:
    probes = default_probes(places)
    assert 1 <= probes <= places
    for split, error in ERRORS.items():
        assert SPREAD / math.sqrt(default_contexts(split, probes) * probes) <= error * (1 + 1e-9)


def test_long_contexts_are_read_once_for_a_candidate() -> None:
    """Between contexts nothing varies on a real model: more probes of one context are cheaper than another context."""
    assert (default_probes(100), default_contexts("search", 53)) == (53, 1)
    assert (default_probes(40), default_contexts("search", 27)) == (27, 2)
    assert default_contexts("test", 1000) == 8  # fewer clusters make no interval
    with pytest.raises(ValueError, match="standard error of 0"):
        cheapest(Components(1.0, 0.0), 0.0, places=1, context_cost=1.0, probe_cost=1.0)


def test_settings_are_settled_once_the_questions_are_known() -> None:
    settled = SearchConfig(test_contexts=5).settled(27)
    assert [settled.n_contexts(split) for split in ("search", "validation", "test")] == [2, 8, 5]
    assert settled.settled(53) == settled  # what is a number stays
    few = SearchConfig().settled(27, {"search": 1, "validation": None, "test": 3})
    assert (few.search_contexts, few.validation_contexts, few.test_contexts) == (1, 8, 3)
    assert SearchConfig().n_contexts("search") == 1


def test_variance_components_of_known_data() -> None:
    rng = np.random.default_rng(3)
    contexts, probes = 4000, 12
    base = rng.normal(size=(contexts, probes))
    other = base + 0.3 + 0.5 * rng.normal(size=(contexts, 1)) + 2.0 * rng.normal(size=(contexts, probes))
    found = components(scored(base), scored(other))
    assert found is not None and found.between is not None
    assert found.within == pytest.approx(4.0, rel=0.03)
    assert found.between == pytest.approx(0.25, rel=0.15)
    # the standard error that they predict is the one that means over few contexts have
    means = (other - base).reshape(1000, 4, probes).mean(axis=(1, 2))
    assert found.standard_error(4, probes) == pytest.approx(means.std(), rel=0.1)


def test_variance_components_by_hand() -> None:
    # differences 1, 3 and 4, 6, 8: means 2 and 6, within (2 + 8) / 3; n0 = (5 - 13 / 5) / 1
    found = components(scored([[0.0, 0.0], [0.0, 0.0, 0.0]]), scored([[1.0, 3.0], [4.0, 6.0, 8.0]]))
    assert found is not None
    assert found.within == pytest.approx(10 / 3)
    grand = 22 / 5
    assert found.between == pytest.approx((2 * (2 - grand) ** 2 + 3 * (6 - grand) ** 2 - 10 / 3) / 2.4)
    same = components(scored([[0.0, 0.0]] * 3), scored([[1.0, -1.0]] * 3))
    assert same == Components(2.0, 0.0)  # below 0 it is 0
    assert components(scored([[0.0, 0.0]]), scored([[1.0, 3.0]])) == Components(2.0, None)


def test_what_has_no_components() -> None:
    assert components([], []) is None
    assert components(scored([[0.0]]), scored([[1.0]])) is None
    assert components(scored([[0.0, 0.0]]), scored([[1.0, -math.inf]])) is None
    assert typical([(scored([[0.0]]), scored([[1.0]]))]) is None
    sides = [(scored([[0.0, 0.0]]), scored([[-k, k]])) for k in (1.0, 2.0, 100.0)]
    assert typical(sides) == Components(8.0, None)  # a ruined model among them does not matter


def test_it_is_said_in_words() -> None:
    assert variation_text(Components(0.0036, 0.0), 1, 53) == (
        "candidate minus base: standard deviation 0.06 nats over the questions of a context, 0 between contexts; "
        "1 context of 53 questions measure a gain to 0.0082 nats (standard error)"
    )
