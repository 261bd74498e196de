"""A model under factors against the base model on the same contexts: means, gains, and whether they are enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..scores import ContextScore
from .intervals import Interval, Strata, answers_interval, by_probe, draws, finite, mean_interval

_MAX_DEPTHS, _BINS = 11, 10
_DIGITS = 6
"""Decimals of what ``best.json`` holds."""


@dataclass(frozen=True)
class DepthComparison:
    """Both sides at one depth: accuracies (0 to 1) over ``n_probes`` probes, and the paired difference."""

    depth: float
    n_probes: int
    base_accuracy: float
    accuracy: float
    accuracy_gain: Interval

    def to_json(self) -> dict[str, Any]:
        """Return it as ``best.json`` holds it."""
        return {
            "depth": finite(self.depth, _DIGITS),
            "probes": self.n_probes,
            "base_accuracy": finite(self.base_accuracy, _DIGITS),
            "accuracy": finite(self.accuracy, _DIGITS),
            "accuracy_gain": _ends(self.accuracy_gain),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DepthComparison:
        """Return what `to_json` wrote."""
        sides = _number(value["base_accuracy"]), _number(value["accuracy"])
        return cls(_number(value["depth"]), int(value["probes"]), *sides, _interval(value["accuracy_gain"]))


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

    def to_json(self) -> dict[str, Any]:
        """Return what ``best.json`` holds of a comparison: six decimals, an interval as its mean and ends."""
        return {
            "contexts": self.n_contexts,
            "base_accuracy": finite(self.base_accuracy, _DIGITS),
            "accuracy": finite(self.accuracy, _DIGITS),
            "accuracy_gain": _ends(self.accuracy_gain),
            "log_probability_gain": _ends(self.log_probability_gain),
            "by_depth": [row.to_json() for row in self.by_depth],
        } | ({} if self.n_effective is None else {"effective_contexts": finite(self.n_effective, _DIGITS)})

    @classmethod
    def from_json(cls, value: Mapping[str, Any], confidence: float) -> Comparison:
        """Return what `to_json` wrote, of intervals of this ``confidence``."""
        effective = value.get("effective_contexts")
        sides = _number(value["base_accuracy"]), _number(value["accuracy"])
        gains = _interval(value["accuracy_gain"]), _interval(value["log_probability_gain"])
        by_depth = tuple(map(DepthComparison.from_json, value["by_depth"]))
        n_effective = None if effective is None else float(effective)
        return cls(int(value["contexts"]), confidence, *sides, *gains, by_depth, n_effective)

    def recorded(self) -> Comparison:
        """Return it with the decimals that ``best.json`` keeps of it."""
        return self.from_json(self.to_json(), self.confidence)


def contexts_needed(confidence: float) -> int:
    """Return the fewest contexts on which an interval can exclude zero with good reason.

    If all n differences share one sign, which chance brings with probability 2^(1 - n), so do all
    resamples; fewer contexts than this would call that significant.
    """
    return math.ceil(1.0 - math.log2(1.0 - confidence) - 1e-9)


def compare(
    base: Sequence[ContextScore],
    other: Sequence[ContextScore],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
    weights: Mapping[str, float] | None = None,
) -> Comparison:
    """Compare ``other`` with ``base``, context by context; intervals by `answers_interval` and `mean_interval`.

    Contexts are resampled, not probes: probes of one context share its prefix and are dependent
    (cluster bootstrap; Davison and Hinkley 1997, section 3.8). Where positions are jittered, each context has its own,
    so that the interval covers them too. `depth_groups` groups the probes. Only where both sides gave the very same
    numbers, as the same factors do, is the gain 0 for certain.

    Contexts of several tasks (`ContextScore.task`) are strata, resampled by themselves; what is compared is the
    ``weights``' mean (1 by default) of their means. Raises `ValueError`: no contexts, or the two sides are not of the
    same contexts and probes.
    """
    pairs = list(zip(base, other, strict=True))
    if not pairs:
        raise ValueError("nothing to compare")
    for a, b in pairs:
        if _asked(a) != _asked(b):
            raise ValueError(f"context {a.split} {a.index} is compared with another")

    each, strata, zero = np.arange(len(pairs)), Strata.of(base, weights), Interval(0.0, 0.0, 0.0)
    counts = draws(strata, seed, resamples)
    depths, group = depth_groups([p.depth for a, _ in pairs for p in a.probes])
    (base_correct, base_log_p, context), (correct, log_p, _) = by_probe(base), by_probe(other)
    with np.errstate(invalid="ignore"):  # -inf - -inf
        d_correct, d_log_p = correct - base_correct, log_p - base_log_p
    same = bool((d_correct == 0.0).all() and (d_log_p == 0.0).all())

    def answers(here: NDArray[np.bool_]) -> Interval:
        return zero if same else answers_interval(d_correct[here], context[here], counts, confidence, strata)

    by_depth = []
    for depth, here in ((depth, group == k) for k, depth in enumerate(depths)):
        before, after = (strata.mean(of_side[here], context[here]) for of_side in (base_correct, correct))
        by_depth.append(DepthComparison(float(depth), int(here.sum()), before, after, answers(here)))
    return Comparison(
        n_contexts=len(pairs),
        confidence=confidence,
        base_accuracy=strata.mean([a.accuracy for a, _ in pairs], each),
        accuracy=strata.mean([b.accuracy for _, b in pairs], each),
        accuracy_gain=answers(np.ones(len(group), bool)),
        log_probability_gain=zero if same else mean_interval(d_log_p, context, counts, confidence, strata),
        by_depth=tuple(by_depth),
        n_effective=strata.n_effective() if len(strata.weight) > 1 else None,
    )


def _asked(score: ContextScore) -> tuple[object, ...]:
    return score.split, score.index, score.task, [probe.depth for probe in score.probes]


def depth_groups(depths: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.int_]]:
    """Return the groups' depths, ascending, and each probe's group: up to 11 depths, else ten bins by their middles."""
    values = np.array(depths, dtype=np.float64)
    if len(np.unique(values)) > _MAX_DEPTHS:
        values = (np.minimum(np.floor(values * _BINS), _BINS - 1) + 0.5) / _BINS
    groups, index = np.unique(values, return_inverse=True)
    return groups, index


def _ends(gain: Interval) -> list[float | None]:
    return list(gain.json(_DIGITS).values())


def _interval(ends: Sequence[Any]) -> Interval:
    return Interval(*map(_number, ends))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
