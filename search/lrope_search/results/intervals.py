"""Confidence intervals of means over contexts, and of answers that two sides give to the same questions.

Questions of one context share its prefix and are dependent, so contexts are what is resampled and counted. SciPy's
`bootstrap` resamples one statistic; here the contexts' resamples serve all depths, both measures and all sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..scores import ContextScore

_FEW_CONTEXTS = 12
"""Of fewer contexts too few different resamples can be drawn; Student's interval is then taken too."""
_FEW_ANSWERS = 40.0
"""Where fewer answers than this differ, as if they were independent, resamples of them say too little."""
_PRIOR_CORRELATION, _PRIOR_ANSWERS = 0.1, 10.0
"""Of answers of one context, as long as few of them differ, and the number of differing answers that it counts for."""

Numbers = NDArray[np.float64]
Places = NDArray[np.int_]


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval."""

    mean: float
    low: float
    high: float

    def json(self, digits: int | None = None) -> dict[str, float | None]:
        """Return the three numbers by name, as `finite` gives them."""
        return {name: finite(value, digits) for name, value in vars(self).items()}

    def within(self, other: Interval) -> Interval:
        """Return this mean with the ends of both, whichever are farther out."""
        return Interval(self.mean, min(self.low, other.low), max(self.high, other.high))


def finite(value: float, digits: int | None = None) -> float | None:
    """Return ``value``, rounded to ``digits`` decimals if they are given; None in place of what JSON does not know."""
    if not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits)


@dataclass(frozen=True)
class Strata:
    """Contexts by task: the number of each one's task, and the weight of each task."""

    task: Places
    weight: Numbers

    @classmethod
    def of(cls, scores: Sequence[ContextScore], weights: Mapping[str, float] | None) -> Strata:
        """Return those of contexts, of whose tasks these are the weights, 1 by default."""
        tasks = list(dict.fromkeys(score.task for score in scores))
        numbers = np.array([tasks.index(score.task) for score in scores])
        return cls(numbers, np.array([(weights or {}).get(task, 1.0) for task in tasks]))

    def members(self, among: Places | None = None) -> list[Places]:
        """Return the places of each task's contexts in ``among`` (None: all contexts), where it has any."""
        task = self.task if among is None else self.task[among]
        return [np.flatnonzero(task == number) for number in np.unique(task)]

    def weights(self, among: Places) -> Numbers:
        """Return the share of each task that the contexts ``among`` have, in the order of `members`; sum 1."""
        weights = self.weight[np.unique(self.task[among])]
        share: Numbers = weights / weights.sum()
        return share

    def mean(self, values: Sequence[float] | Numbers, context: Places) -> float:
        """Return the weighted mean of the tasks' means of ``values``, each of a ``context``."""
        values = np.asarray(values, np.float64)
        means = np.array([values[here].mean() for here in self.members(context)])
        return float(self.weights(context) @ means)

    def n_effective(self) -> float:
        """Return how many contexts of equal weight would tell as much as these."""
        sizes = np.bincount(self.task)
        return float(self.weight.sum() ** 2 / (self.weight**2 / sizes).sum())


def draws(strata: Strata, seed: int, resamples: int) -> Numbers:
    """Return how often each context is in each resample, shape (resamples, contexts); tasks are drawn by themselves."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, len(strata.task)))
    for here in strata.members():
        counts[:, here] = rng.multinomial(len(here), np.full(len(here), 1.0 / len(here)), size=resamples)
    return counts


def by_probe(scores: Sequence[ContextScore]) -> tuple[Numbers, Numbers, Places]:
    """Return of every probe whether it is right, its log-probability, and the place of its context in ``scores``."""
    correct = np.array([probe.correct for score in scores for probe in score.probes], np.float64)
    log_p = np.array([probe.log_probability for score in scores for probe in score.probes])
    return correct, log_p, np.repeat(np.arange(len(scores)), [len(score.probes) for score in scores])


def mean_interval(
    differences: Numbers, context: Places, counts: Numbers, confidence: float, strata: Strata
) -> Interval:
    """Return the mean over contexts of each one's mean difference, with its expanded percentile bootstrap interval.

    Percentiles are those that would give Student's t interval if the means were normal ("expanded" in Hesterberg, arXiv
    1411.5279), with the degrees of freedom of Welch and Satterthwaite where there are several tasks. Of fewer than
    twelve contexts of a task, Student's interval is taken too: of four, the bootstrap alone covers 85 to 90 %.
    NaN if a difference is not finite; infinite ends where a task has one context, which does not tell how it varies.

    Args:
        differences: one a question.
        context: the place of each question's context.
        counts: see `draws`.
        confidence: share of intervals that are to cover the truth.
        strata: the contexts' tasks.
    """
    present, index = np.unique(context, return_inverse=True)  # a depth need not occur in every context
    means = np.bincount(index, differences) / np.bincount(index)
    if not np.isfinite(means).all():
        return Interval(math.nan, math.nan, math.nan)
    members, weights = strata.members(present), strata.weights(present)
    mean = strata.mean(means, present)
    sizes = np.array([len(here) for here in members])
    if sizes.min() == 1:
        return Interval(mean, -math.inf, math.inf)
    resampled = np.zeros(len(counts))
    with np.errstate(invalid="ignore"):  # 0 / 0 where a resample has none of them
        for here, weight in zip(members, weights, strict=True):
            drawn = counts[:, present[here]]
            resampled += weight * (drawn @ means[here] / drawn.sum(axis=1))
    variances = np.array([means[here].var(ddof=1) for here in members]) * weights**2 / sizes
    error, freedom, short = math.sqrt(variances.sum()), float(sizes[0] - 1), float(sizes[0] / (sizes[0] - 1))
    if len(members) > 1 and error > 0.0:
        freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()
        short = variances.sum() / (variances * (sizes - 1) / sizes).sum()
    quantile = float(stats.t.ppf(0.5 + confidence / 2.0, freedom))
    # the spread of resamples is that of the sample with divisor n
    tail = 100.0 * float(stats.norm.sf(quantile * math.sqrt(short)))
    low, high = np.round(np.nanpercentile(resampled, [tail, 100.0 - tail]), 12)  # what cancels gives 0, not 1e-17
    found = Interval(mean, float(low), float(high))
    if sizes.min() < _FEW_CONTEXTS:
        found = found.within(Interval(mean, *(round(mean + side * quantile * error, 12) for side in (-1.0, 1.0))))
    return found


def answers_interval(
    differences: Numbers, context: Places, counts: Numbers, confidence: float, strata: Strata
) -> Interval:
    """Return `mean_interval` of differences between two sides' answers, each from -1 to 1, and never too narrow.

    Where no answer differs, or few do, resamples of them have no width, or too little of it (of 12 contexts of one
    question, 67 % of the intervals would have none). There, the interval by scores is taken too: Wilson's for the
    shares of answers that one side alone has right and that the other has (Wilson 1927), their difference by Newcombe's
    rule (Statistics in Medicine 17, 1998: square-and-add), with the number of questions divided by a `_design_effect`.
    """
    found = mean_interval(differences, context, counts, confidence, strata)
    parts, few = [], False
    for here in strata.members(context):
        values, parts_each = differences[here], _parts(differences[here])
        n_differ = parts_each * float(np.abs(values).sum())
        effect = _design_effect(values, context[here], parts_each, n_differ)
        few |= n_differ < _FEW_ANSWERS * effect or found.low == found.high or not math.isfinite(found.low)
        n = parts_each * len(values) / effect
        better, worse = (wilson(float(np.maximum(side * values, 0.0).mean()), n, confidence) for side in (1, -1))
        low = math.hypot(better.mean - better.low, worse.high - worse.mean)
        high = math.hypot(better.high - better.mean, worse.mean - worse.low)
        parts.append((low, high))
    if few and not math.isnan(found.mean):
        low, high = (
            math.hypot(*(weight * side for weight, side in zip(strata.weights(context), sides, strict=True)))
            for sides in zip(*parts, strict=True)
        )
        scored = Interval(found.mean, found.mean - low, found.mean + high)
        found = found.within(scored) if math.isfinite(found.low) else scored
    return Interval(found.mean, max(found.low, -1.0), min(found.high, 1.0))


def share_interval(values: Numbers, context: Places, confidence: float, strata: Strata) -> Interval:
    """Return the weighted mean of tasks' shares of right answers, with Wilson's interval; ``values`` from 0 to 1.

    Questions of one context count by the `_design_effect`: as so many independent ones as they are worth.
    """
    parts, weights = [], strata.weights(context)
    for here in strata.members(context):
        share = float(values[here].mean())
        n = _parts(values[here]) * len(here)
        effect = _design_effect(values[here], context[here], n // len(here), n * min(share, 1.0 - share))
        parts.append(wilson(share, n / effect, confidence))
    mean = float(sum(weight * part.mean for weight, part in zip(weights, parts, strict=True)))
    low = math.hypot(*(weight * (part.mean - part.low) for weight, part in zip(weights, parts, strict=True)))
    high = math.hypot(*(weight * (part.high - part.mean) for weight, part in zip(weights, parts, strict=True)))
    return Interval(mean, mean - low, mean + high)


def wilson(share: float, n: float, confidence: float = 0.95) -> Interval:
    """Return the score interval of a share seen in ``n`` independent trials (Wilson 1927).

    Unlike a bootstrap interval it keeps a width where all trials agree: 16 right answers of 16 do not show that
    every answer is right.
    """
    z2 = float(stats.norm.ppf(0.5 + confidence / 2.0)) ** 2
    centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n)
    half = math.sqrt(z2 / n * (share * (1.0 - share) + z2 / (4.0 * n))) / (1.0 + z2 / n)
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))


def _parts(values: Numbers) -> int:
    """Return of how many parts an answer is, by the least share of one that is seen; 1 where all are right or wrong."""
    shares = np.concatenate([np.abs(values), 1.0 - np.abs(values)])
    return min(max(round(1.0 / float(shares[shares > 1e-9].min(initial=1.0))), 1), 100)


def _design_effect(values: Numbers, context: Places, parts: int, n_telling: float) -> float:
    """Return how many answers tell as much as one independent answer (Kish's design effect); at least 1.

    An answer of several ``parts``, of which a share is right, counts as so many answers of its context.

    It is what the means of contexts show: their variance over that of as many independent answers. Where few answers
    tell (``n_telling``: those unlike the rest), they cannot show it; an assumed correlation within contexts then counts
    too, for as much as ten such answers.
    """
    _, index = np.unique(context, return_inverse=True)
    sizes = np.bincount(index)
    n, contexts = parts * len(values), len(sizes)
    assumed = 1.0 + max(n / contexts - 1.0, 0.0) * _PRIOR_CORRELATION
    if contexts == 1:
        return assumed
    variance = max(float(np.mean(np.abs(values)) - np.mean(values) ** 2), 0.0) / n  # of parts that are -1, 0 or 1
    seen = float((np.bincount(index, values) / sizes).var(ddof=1)) / contexts / variance if variance > 0.0 else 1.0
    seen = max(seen, 1.0)
    return max(seen, (_PRIOR_ANSWERS * assumed + n_telling * seen) / (_PRIOR_ANSWERS + n_telling))
