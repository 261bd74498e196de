"""What a candidate is worth: paired differences against the base model, seen through racing rungs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .algorithm import Candidate, Score, rank
from .executor import Job
from .types import ContextScore


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


@dataclass(frozen=True)
class Racing:
    """Successive halving over contexts (Jamieson and Talwalkar, arXiv 1502.07943).

    All candidates of a generation see the first ``first`` contexts; the best ``fraction`` of them goes on
    to the next rung, which brings the contexts seen to ``1 / fraction`` times as many, until all
    ``n_contexts`` are seen. ``fraction = 1`` turns racing off. Decisions depend on scores alone.
    """

    n_contexts: int
    first: int = 1
    fraction: float = 0.5

    def rungs(self, n_candidates: int) -> list[tuple[int, range]]:
        """Return ``(candidates left, their new context indices)`` for every rung, known before any score is."""
        stop = self.n_contexts if self.fraction == 1.0 else min(self.first, self.n_contexts)
        rungs = [(n_candidates, range(stop))]
        while stop < self.n_contexts:
            start, stop = stop, min(math.ceil(stop / self.fraction), self.n_contexts)
            n_candidates = math.ceil(n_candidates * self.fraction)
            rungs.append((n_candidates, range(start, stop)))
        return rungs

    def evaluations(self, n_candidates: int) -> int:
        """Return how many context evaluations a race of ``n_candidates`` takes."""
        return sum(n * len(contexts) for n, contexts in self.rungs(n_candidates))

    def run(
        self,
        candidates: Sequence[Candidate],
        evaluate: Callable[[Sequence[Job]], Mapping[Job, ContextScore]],
        objective: Objective,
        split: str = "search",
    ) -> list[tuple[Candidate, Score]]:
        """Race ``candidates``: their scores ``(contexts seen, fitness)``, best first.

        Scores compare as tuples, so that one dropped early never outranks one that went on; equal scores
        rank by age.
        """
        ranked: list[tuple[Candidate, Score]] = [(candidate, (0, 0.0)) for candidate in candidates]
        results: dict[Job, ContextScore] = {}
        for n_left, contexts in self.rungs(len(candidates)):
            racing = [candidate for candidate, _ in ranked[:n_left]]
            results |= evaluate([Job(c.factors, split, i) for c in racing for i in contexts])
            scored: list[tuple[Candidate, Score]] = []
            for candidate in racing:
                seen = [results[Job(candidate.factors, split, i)] for i in range(contexts.stop)]
                scored.append((candidate, (len(seen), objective.fitness(seen))))
            ranked[:n_left] = sorted(scored, key=rank)
        return ranked
