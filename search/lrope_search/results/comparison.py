"""Is the gain real? Paired bootstrap over contexts.

SciPy's `bootstrap` resamples one statistic; here the contexts' resamples serve all depths, both measures and all sides,
and probes stay in their contexts' clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..scores import ContextScore

_MAX_DEPTHS, _BINS = 11, 10


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float

    def json(self, digits: int | None = None) -> dict[str, float | None]:
        """Return the three numbers by name, as `finite` gives them."""
        return {name: finite(value, digits) for name, value in vars(self).items()}


@dataclass(frozen=True)
class DepthComparison:
    """Both sides at one depth: accuracies (0 to 1) over ``n_probes`` probes, and paired differences."""

    depth: float
    n_probes: int
    base_accuracy: float
    accuracy: float
    accuracy_gain: Interval
    log_probability_gain: Interval


@dataclass(frozen=True)
class Comparison:
    """A model under factors against the base model on the same contexts.

    Gains are differences of means over contexts: accuracy 0 to 1, log-probability in nats per token. Of several tasks
    they are weighted means of the tasks' means; ``n_effective`` contexts that all count alike would tell as much
    (Kish's effective sample size); None: all count alike.
    """

    n_contexts: int
    confidence: float
    base_accuracy: float
    accuracy: float
    accuracy_gain: Interval
    log_probability_gain: Interval
    by_depth: tuple[DepthComparison, ...]
    n_effective: float | None = None

    @property
    def enough(self) -> bool:
        """Whether there are enough contexts for an interval to mean something."""
        n = self.n_contexts if self.n_effective is None else self.n_effective
        return n + 1e-9 >= contexts_needed(self.confidence)

    @property
    def significant(self) -> bool:
        """Whether the accuracy's interval lies above zero, on `enough` contexts."""
        return self.enough and self.accuracy_gain.low > 0.0

    @property
    def harmful(self) -> bool:
        """Whether the accuracy's interval lies below zero, on `enough` contexts."""
        return self.enough and self.accuracy_gain.high < 0.0

    def json(self) -> dict[str, Any]:
        """Return what ``best.json`` holds of a comparison: six decimals, an interval as its mean and ends."""
        return {
            "contexts": self.n_contexts,
            "base_accuracy": finite(self.base_accuracy, 6),
            "accuracy": finite(self.accuracy, 6),
            "accuracy_gain": list(self.accuracy_gain.json(6).values()),
            "log_probability_gain": list(self.log_probability_gain.json(6).values()),
            "by_depth": [
                {
                    "depth": finite(row.depth, 6),
                    "probes": row.n_probes,
                    "base_accuracy": finite(row.base_accuracy, 6),
                    "accuracy": finite(row.accuracy, 6),
                    "accuracy_gain": list(row.accuracy_gain.json(6).values()),
                }
                for row in self.by_depth
            ],
        }


def finite(value: float, digits: int | None = None) -> float | None:
    """Return ``value``, rounded to ``digits`` decimals if they are given; None in place of what JSON does not know."""
    if not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits)


def contexts_needed(confidence: float) -> int:
    """Return the fewest contexts on which a bootstrap interval can exclude zero with good reason.

    If all n differences share one sign, which chance brings with probability 2^(1 - n), so do all
    resamples; fewer contexts than this would call that significant.
    """
    return math.ceil(1.0 - math.log2(1.0 - confidence))


def compare(
    base: Sequence[ContextScore],
    other: Sequence[ContextScore],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
    weights: Mapping[str, float] | None = None,
) -> Comparison:
    """Compare ``other`` with ``base``, context by context, with expanded percentile bootstrap intervals.

    Contexts are resampled, not probes: probes of one context share its prefix and are dependent
    (cluster bootstrap; Davison and Hinkley 1997, section 3.8). Few contexts make plain percentile intervals too
    narrow (of six normal differences, 86 % cover instead of 95 %): the percentiles are those that would give Student's
    t interval if the means were normal ("expanded" in Hesterberg, arXiv 1411.5279). Where positions are jittered, each
    context has its own, so that the interval covers them too. `depth_groups` groups the probes.

    Contexts of several tasks (`ContextScore.task`) are strata, resampled by themselves; what is compared is the
    ``weights``' mean (1 by default) of their means, with the degrees of freedom of Welch and Satterthwaite.

    Raises:
        ValueError: no contexts, or the two sides are not of the same contexts and probes.
    """
    pairs = list(zip(base, other, strict=True))
    if not pairs:
        raise ValueError("nothing to compare")
    for a, b in pairs:
        if _asked(a) != _asked(b):
            raise ValueError(f"context {a.split} {a.index} is compared with another")

    n = len(pairs)
    rng = np.random.default_rng(seed)
    tasks = list(dict.fromkeys(a.task for a, _ in pairs))
    strata = Strata(
        np.array([tasks.index(a.task) for a, _ in pairs]), np.array([(weights or {}).get(task, 1.0) for task in tasks])
    )
    counts = np.empty((resamples, n))
    for here in strata.members():
        counts[:, here] = rng.multinomial(len(here), np.full(len(here), 1.0 / len(here)), size=resamples)

    depths, group = depth_groups([p.depth for a, _ in pairs for p in a.probes])
    context = np.repeat(np.arange(n), [len(a.probes) for a, _ in pairs])
    sides = (base, other)
    correct = np.array([[float(p.correct) for score in side for p in score.probes] for side in sides])
    log_p = np.array([[p.log_probability for score in side for p in score.probes] for side in sides])
    with np.errstate(invalid="ignore"):  # -inf - -inf
        d_correct, d_log_p = correct[1] - correct[0], log_p[1] - log_p[0]

    by_depth = []
    for k, depth in enumerate(depths):
        here = group == k
        by_depth.append(
            DepthComparison(
                depth=float(depth),
                n_probes=int(here.sum()),
                base_accuracy=strata.mean(correct[0, here], context[here]),
                accuracy=strata.mean(correct[1, here], context[here]),
                accuracy_gain=_interval(d_correct[here], context[here], counts, confidence, strata),
                log_probability_gain=_interval(d_log_p[here], context[here], counts, confidence, strata),
            )
        )
    return Comparison(
        n_contexts=n,
        confidence=confidence,
        base_accuracy=strata.mean([a.accuracy for a, _ in pairs], np.arange(n)),
        accuracy=strata.mean([b.accuracy for _, b in pairs], np.arange(n)),
        accuracy_gain=_interval(d_correct, context, counts, confidence, strata),
        log_probability_gain=_interval(d_log_p, context, counts, confidence, strata),
        by_depth=tuple(by_depth),
        n_effective=strata.n_effective() if len(tasks) > 1 else None,
    )


@dataclass(frozen=True)
class Strata:
    """Contexts by task: the number of each one's task, and the weight of each task."""

    task: NDArray[np.int_]
    weight: NDArray[np.float64]

    def members(self, among: NDArray[np.int_] | None = None) -> list[NDArray[np.int_]]:
        """Return the places of each task's contexts in ``among`` (None: all contexts), where it has any."""
        task = self.task if among is None else self.task[among]
        return [np.flatnonzero(task == number) for number in np.unique(task)]

    def weights(self, among: NDArray[np.int_]) -> NDArray[np.float64]:
        """Return the weights of the tasks that the contexts ``among`` have, in the order of `members`."""
        return self.weight[np.unique(self.task[among])]

    def mean(self, values: Sequence[float] | NDArray[np.float64], context: NDArray[np.int_]) -> float:
        """Return the weighted mean of the tasks' means of ``values``, each of a ``context``."""
        values = np.asarray(values, np.float64)
        means = np.array([values[here].mean() for here in self.members(context)])
        weights = self.weights(context)
        return float((weights * means).sum() / weights.sum())

    def n_effective(self) -> float:
        """Return how many contexts of equal weight would tell as much as these."""
        sizes = np.bincount(self.task)
        return float(self.weight.sum() ** 2 / (self.weight**2 / sizes).sum())


def _asked(score: ContextScore) -> tuple[object, ...]:
    return score.split, score.index, score.task, [probe.depth for probe in score.probes]


def depth_groups(depths: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.int_]]:
    """Return the groups' depths, ascending, and the group of every probe: a row of a table each.

    Up to 11 depths stand for themselves; more of them are put into ten equal bins, named by their middles.
    """
    values = np.array(depths, dtype=np.float64)
    if len(np.unique(values)) > _MAX_DEPTHS:
        values = (np.minimum(np.floor(values * _BINS), _BINS - 1) + 0.5) / _BINS
    groups, index = np.unique(values, return_inverse=True)
    return groups, index


def _tail(strata: Sequence[NDArray[np.float64]], weights: NDArray[np.float64], confidence: float) -> float:
    """Return what an interval leaves out at each end of the resampled means of differences, given by stratum.

    Their spread is that of the sample with divisor n, and normal quantiles are too near: both are made good. Of several
    strata, each adds its share to the variance and, by Welch and Satterthwaite, to the degrees of freedom.
    """
    sizes = np.array([len(values) for values in strata])
    if sizes.min() == 1:
        return 0.0
    freedom, short = float(sizes[0] - 1), float(sizes[0] / (sizes[0] - 1))
    variances = np.array([values.var(ddof=1) for values in strata]) * weights**2 / sizes
    if len(strata) > 1 and variances.sum() > 0.0:
        freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()
        short = variances.sum() / (variances * (sizes - 1) / sizes).sum()
    quantile = stats.t.ppf(0.5 + confidence / 2.0, freedom) * math.sqrt(short)
    return float(stats.norm.sf(quantile))


def _interval(
    differences: NDArray[np.float64],
    context: NDArray[np.int_],
    counts: NDArray[np.float64],
    confidence: float,
    strata: Strata | None = None,
) -> Interval:
    """Bootstrap interval of the mean over contexts of each context's mean difference; NaN if one is not finite.

    ``counts`` has shape (resamples, contexts): how often each context was drawn. ``strata``: None if there is one task.
    """
    strata = strata or Strata(np.zeros(counts.shape[1], np.int_), np.ones(1))
    present, index = np.unique(context, return_inverse=True)  # a depth need not occur in every context
    means = np.bincount(index, differences) / np.bincount(index)
    if not np.isfinite(means).all():
        return Interval(math.nan, math.nan, math.nan)
    members, weights = strata.members(present), strata.weights(present)
    resampled = np.zeros(len(counts))
    with np.errstate(invalid="ignore"):  # 0 / 0 where a resample has none of them
        for here, weight in zip(members, weights, strict=True):
            drawn = counts[:, present[here]]
            resampled += weight * (drawn @ means[here] / drawn.sum(axis=1)) / weights.sum()
    tail = 100.0 * _tail([means[here] for here in members], weights, confidence)
    ends = np.nanpercentile(resampled, [tail, 100.0 - tail])
    low, high = np.round(ends, 12)  # differences that cancel give 0, not 1e-17
    return Interval(strata.mean(means, present), float(low), float(high))
