"""Fitness of candidates: paired differences against the base model on the same contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from ..scores import ContextScore, depth_weight

K = TypeVar("K")

_LEAST_SCALE = 1e-3  # nats: of a task whose answers the base model gives all alike


class Objective:
    """Mean paired difference in answer log-probability against the base model on the same contexts.

    Every context of a task counts alike. Of several tasks it is the weighted mean, over those that are there, of their
    means, each divided by its task's scale (`task_scales`). Within a context a probe weighs `depth_weight`: with a
    ``middle_weight`` of 0 all depths count alike, with 3 the middle counts four times as much as either end ("lost in
    the middle", arXiv 2307.03172).
    """

    def __init__(
        self,
        base: Sequence[ContextScore],
        middle_weight: float = 0.0,
        weights: Mapping[str, float] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        """Take the base model's scores, one a context, and the tasks' ``weights`` and ``scales``, each 1 by default."""
        self._middle_weight = middle_weight
        self._weights, self._scales = weights or {}, scales or {}
        self._base = {(score.split, score.index): self._weighted(score) for score in base}

    def fitness(self, scores: Sequence[ContextScore]) -> float:
        """Fitness, higher is better, in nats per answer token, or in scales of the tasks; ``-inf`` if not finite."""
        differences: dict[str, list[float]] = {}
        for score in scores:
            difference = self._weighted(score) - self._base[score.split, score.index]
            differences.setdefault(score.task, []).append(difference / self._scales.get(score.task, 1.0))
        if not all(math.isfinite(difference) for of_task in differences.values() for difference in of_task):
            return -math.inf
        weights = {task: self._weights.get(task, 1.0) for task in differences}
        means = {task: math.fsum(of_task) / len(of_task) for task, of_task in differences.items()}
        return math.fsum(weights[task] * means[task] for task in means) / math.fsum(weights.values())

    def lead(self, one: Sequence[ContextScore], other: Sequence[ContextScore]) -> tuple[float, float]:
        """Return how much fitter ``one`` is than ``other`` on the same contexts, and the standard error of that.

        Contexts are what varies; the error is infinite where a task has a single one.
        """
        differences: dict[str, list[float]] = {}
        for a, b in zip(one, other, strict=True):
            difference = (self._weighted(a) - self._weighted(b)) / self._scales.get(a.task, 1.0)
            differences.setdefault(a.task, []).append(difference)
        weights = np.array([self._weights.get(task, 1.0) for task in differences])
        means = np.array([np.mean(of_task) for of_task in differences.values()])
        variances = np.array([np.var(d, ddof=1) / len(d) if len(d) > 1 else math.inf for d in differences.values()])
        shares = weights / weights.sum()
        return float(shares @ means), math.sqrt(float(shares**2 @ variances))

    def of_all(self, scores: Mapping[K, Sequence[ContextScore]]) -> dict[K, float]:
        """Return the fitness of each."""
        return {key: self.fitness(of_key) for key, of_key in scores.items()}

    def _weighted(self, score: ContextScore) -> float:
        weights = [depth_weight(probe.depth, self._middle_weight) for probe in score.probes]
        total = sum(w * p.log_probability for w, p in zip(weights, score.probes, strict=True))
        return total / sum(weights)


def task_scales(base: Sequence[ContextScore]) -> dict[str, float]:
    """Return, by task, how far the base model's log-probabilities lie apart over its questions, in nats.

    That is their standard deviation, by which tasks of any kind of answer become alike: half a nat is nothing to one
    whose questions lie 2 nats apart, and much to one where 0.2 part them. It needs the base model alone, so that it is
    known before any candidate, and is the same for all of them. Of a single question it is that one's distance from 0.
    """
    values: dict[str, list[float]] = {}
    for score in base:
        values.setdefault(score.task, []).extend(probe.log_probability for probe in score.probes)
    return {
        task: max(float(np.std(of_task, ddof=1)) if len(of_task) > 1 else abs(of_task[0]), _LEAST_SCALE)
        for task, of_task in values.items()
    }


def unit_of(scales: Mapping[str, float] | None) -> str:
    """Return the unit of fitness in words: of one task, or of several that are not scaled, nats per answer token."""
    return "nats" if scales is not None and not scales else "standard deviations"
