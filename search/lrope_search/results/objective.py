"""What a candidate is worth: paired differences against the base model on the same contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..scores import ContextScore


class Objective:
    """Mean paired difference in answer log-probability against the base model on the same contexts.

    Every context counts alike. Within a context a probe at depth ``d`` weighs
    ``1 + middle_weight * 4 d (1 - d)``: with 0 all depths count alike, with 3 the middle counts
    four times as much as either end ("lost in the middle", arXiv 2307.03172).
    """

    def __init__(self, base: Sequence[ContextScore], middle_weight: float = 0.0) -> None:
        """Take the base model's scores (all factors 1), one a context."""
        self._middle_weight = middle_weight
        self._base = {(score.split, score.index): self._weighted(score) for score in base}

    def fitness(self, scores: Sequence[ContextScore]) -> float:
        """Fitness in nats per answer token, higher is better; ``-inf`` where the model gave no finite number."""
        differences = [self._weighted(score) - self._base[score.split, score.index] for score in scores]
        return math.fsum(differences) / len(differences) if all(map(math.isfinite, differences)) else -math.inf

    def _weighted(self, score: ContextScore) -> float:
        weights = [1.0 + self._middle_weight * 4.0 * p.depth * (1.0 - p.depth) for p in score.probes]
        total = sum(w * p.log_probability for w, p in zip(weights, score.probes, strict=True))
        return total / sum(weights)
