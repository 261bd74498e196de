"""What a candidate is worth: paired differences against the base model on the same contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..scores import ContextScore


class Objective:
    """Mean paired difference in answer log-probability against the base model on the same contexts.

    Every context of a task counts alike; of several tasks it is the weighted mean of their means, over those that are
    there. Within a context a probe at depth ``d`` weighs
    ``1 + middle_weight * 4 d (1 - d)``: with 0 all depths count alike, with 3 the middle counts
    four times as much as either end ("lost in the middle", arXiv 2307.03172).
    """

    def __init__(
        self, base: Sequence[ContextScore], middle_weight: float = 0.0, weights: Mapping[str, float] | None = None
    ) -> None:
        """Take the base model's scores (all factors 1), one a context, and the ``weights`` of tasks, 1 by default."""
        self._middle_weight = middle_weight
        self._weights = weights or {}
        self._base = {(score.split, score.index): self._weighted(score) for score in base}

    def fitness(self, scores: Sequence[ContextScore]) -> float:
        """Fitness in nats per answer token, higher is better; ``-inf`` where the model gave no finite number."""
        differences: dict[str, list[float]] = {}
        for score in scores:
            difference = self._weighted(score) - self._base[score.split, score.index]
            differences.setdefault(score.task, []).append(difference)
        if not all(math.isfinite(difference) for of_task in differences.values() for difference in of_task):
            return -math.inf
        weights = {task: self._weights.get(task, 1.0) for task in differences}
        means = {task: math.fsum(of_task) / len(of_task) for task, of_task in differences.items()}
        return math.fsum(weights[task] * means[task] for task in means) / math.fsum(weights.values())

    def _weighted(self, score: ContextScore) -> float:
        weights = [1.0 + self._middle_weight * 4.0 * p.depth * (1.0 - p.depth) for p in score.probes]
        total = sum(w * p.log_probability for w, p in zip(weights, score.probes, strict=True))
        return total / sum(weights)
