"""Is the gain real? Paired bootstrap over contexts, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..scores import ContextScore, DivergenceScore


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


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

    Gains are differences of means over contexts: accuracy 0 to 1, log-probability in nats per token.
    """

    n_contexts: int
    confidence: float
    base_accuracy: float
    accuracy: float
    accuracy_gain: Interval
    log_probability_gain: Interval
    by_depth: tuple[DepthComparison, ...]

    @property
    def significant(self) -> bool:
        """Whether the accuracy's interval lies above zero, on enough contexts for that to mean something."""
        return self.n_contexts >= contexts_needed(self.confidence) and self.accuracy_gain.low > 0.0


@dataclass(frozen=True)
class Verdict:
    """Whether to use the curve, and why, in words."""

    recommended: bool
    text: str


def contexts_needed(confidence: float) -> int:
    """Return the fewest contexts on which a bootstrap interval can exclude zero with good reason.

    If all n differences share one sign, which chance brings with probability 2^(1 - n), so do all
    resamples; fewer contexts than this would call that significant.
    """
    return math.ceil(1.0 - math.log2(1.0 - confidence))


def wilson(share: float, n: int, confidence: float = 0.95) -> Interval:
    """Return the score interval of a share seen in ``n`` independent trials (Wilson 1927).

    Unlike a bootstrap interval it keeps a width where all trials agree: 16 right answers of 16 do not show that
    every answer is right.
    """
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2.0) ** 2
    centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n)
    half = math.sqrt(z2 / n * (share * (1.0 - share) + z2 / (4.0 * n))) / (1.0 + z2 / n)
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))


def compare(
    base: Sequence[ContextScore],
    other: Sequence[ContextScore],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
    max_depths: int = 11,
) -> Comparison:
    """Compare ``other`` with ``base``, context by context, with expanded percentile bootstrap intervals.

    Contexts are resampled, not probes: probes of one context share its prefix and are dependent
    (cluster bootstrap; Davison and Hinkley 1997, section 3.8). Few contexts make plain percentile intervals too
    narrow (of six normal differences, 86 % cover instead of 95 %): the percentiles are those that would give Student's
    t interval if the means were normal ("expanded" in Hesterberg, arXiv 1411.5279). Probes are grouped by depth, and by
    the nearest of ``max_depths`` evenly spaced depths where there are more of them than that.

    Raises:
        ValueError: no contexts, or the two sides are not of the same contexts and probes.
    """
    pairs = list(zip(base, other, strict=True))
    if not pairs:
        raise ValueError("nothing to compare")
    for a, b in pairs:
        if (a.split, a.index, [p.depth for p in a.probes]) != (b.split, b.index, [p.depth for p in b.probes]):
            raise ValueError(f"context {a.split} {a.index} is compared with another")

    n = len(pairs)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)  # (resamples, contexts)

    depths, group = _depth_groups([p.depth for a, _ in pairs for p in a.probes], max_depths)
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
                base_accuracy=float(correct[0, here].mean()),
                accuracy=float(correct[1, here].mean()),
                accuracy_gain=_interval(d_correct[here], context[here], counts, confidence),
                log_probability_gain=_interval(d_log_p[here], context[here], counts, confidence),
            )
        )
    return Comparison(
        n_contexts=n,
        confidence=confidence,
        base_accuracy=float(np.mean([a.accuracy for a, _ in pairs])),
        accuracy=float(np.mean([b.accuracy for _, b in pairs])),
        accuracy_gain=_interval(d_correct, context, counts, confidence),
        log_probability_gain=_interval(d_log_p, context, counts, confidence),
        by_depth=tuple(by_depth),
    )


def verdict(
    curve: Comparison | None,
    uniform: tuple[float, Comparison] | None = None,
    kl: float | None = None,
    *,
    over_uniform: Comparison | None = None,
) -> Verdict:
    """Say whether the curve is worth using: its accuracy must lie above the base model's, interval and all.

    Args:
        curve: The curve against the base model on contexts that neither search nor validation saw;
            None if no curve beat the base model on validation.
        uniform: The best uniform factor, and its comparison with the base model on the same contexts.
        kl: KL divergence from the base model on ordinary text, in nats per token; None if not measured.
        over_uniform: The curve against the best uniform factor (`compare` with that as the base), on the same
            contexts; says how much of the gain is owed to the layers' different factors.
    """
    beside = ""
    if uniform is not None:
        beside = f"; best uniform factor {uniform[0]:g} gains {_points(uniform[1].accuracy_gain.mean)}"
        if over_uniform is not None and curve is not None:
            more = _gain(over_uniform.accuracy_gain)
            beside += f"; {more} above it" if over_uniform.significant else f"; not significantly better: {more}"
    if kl is not None:
        size = f"{kl:.3f}" if not 0.0 < kl < 0.0005 else "under 0.001"
        beside += f"; KL on ordinary text {size}"
    if curve is None:
        return Verdict(False, f"no curve beat the base model on validation: no gain, not recommended{beside}")
    n, needed = curve.n_contexts, contexts_needed(curve.confidence)
    text = f"gain {_gain(curve.accuracy_gain)} on {n} unseen contexts{beside}"
    if curve.significant:
        return Verdict(True, text)
    if n < needed:
        return Verdict(False, f"too few contexts to tell, at least {needed} are needed, not recommended: {text}")
    return Verdict(False, f"no significant gain, not recommended: {text}")


def _gain(gain: Interval) -> str:
    return f"{_points(gain.mean)} points [{_points(gain.low)}, {_points(gain.high)}]"


def divergences_by_length(scores: Iterable[DivergenceScore]) -> dict[str, float]:
    """Return the mean KL divergence, nats per token, on ``short`` and on ``long`` texts; empty without scores.

    ``inf`` where one is not finite.
    """
    scores = list(scores)
    lengths = {"short": [score.short for score in scores], "long": [score.long for score in scores]}
    return {
        name: math.fsum(of) / len(of) if all(map(math.isfinite, of)) else math.inf for name, of in lengths.items() if of
    }


def _points(share: float) -> str:
    return f"{100.0 * share:.1f}"


def _depth_groups(depths: Sequence[float], max_depths: int) -> tuple[NDArray[np.float64], NDArray[np.int_]]:
    """Return the groups' depths, ascending, and the group of every probe."""
    values = np.array(depths, dtype=np.float64)
    if len(np.unique(values)) > max_depths:
        values = np.round(values * (max_depths - 1)) / (max_depths - 1)
    groups, index = np.unique(values, return_inverse=True)
    return groups, index


def _tail(n: int, confidence: float) -> float:
    """Return what an interval leaves out at each end of ``n`` differences' resampled means.

    Their spread is that of the sample with divisor n, and normal quantiles are too near: both are made good.
    """
    if n == 1:
        return 0.0
    quantile = stats.t.ppf(0.5 + confidence / 2.0, n - 1) * math.sqrt(n / (n - 1))
    return float(stats.norm.sf(quantile))


def _interval(
    differences: NDArray[np.float64], context: NDArray[np.int_], counts: NDArray[np.float64], confidence: float
) -> Interval:
    """Bootstrap interval of the mean over contexts of each context's mean difference; NaN if one is not finite.

    ``counts`` has shape (resamples, contexts): how often each context was drawn.
    """
    present, index = np.unique(context, return_inverse=True)  # a depth need not occur in every context
    means = np.bincount(index, differences) / np.bincount(index)
    if not np.isfinite(means).all():
        return Interval(math.nan, math.nan, math.nan)
    drawn = counts[:, present]
    with np.errstate(invalid="ignore"):  # 0 / 0 where a resample has none of them
        resampled = drawn @ means / drawn.sum(axis=1)
    tail = 100.0 * _tail(len(means), confidence)
    ends = np.nanpercentile(resampled, [tail, 100.0 - tail])
    low, high = np.round(ends, 12)  # differences that cancel give 0, not 1e-17
    return Interval(float(means.mean()), float(low), float(high))
