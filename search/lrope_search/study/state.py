"""What the two phases of a search share: who is evaluated on what, and who leads."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lrope_gguf.curve import Curve, CurveFile

from ..optimizers.protocol import Candidate, Score
from ..results.objective import Objective
from ..results.summary import task_weights
from ..scores import ContextScore, Factors, Job
from ..workers.protocol import Executor
from .progress import Progress
from .scheduler import Pipeline
from .settings import SearchConfig
from .store import Study


def uniform_factor(candidate: Candidate) -> float | None:
    """Return the factor of a uniform scaling (of the layers that are searched); None if it is none."""
    moved = {factor for factor in candidate.factors if factor != 1.0}
    whole = len(set(candidate.factors)) == 1
    return moved.pop() if len(moved) == 1 and (whole or candidate.origin == "uniform") else None


class Run:
    """A search under way.

    Attributes:
        base: The base model as a candidate.
        ranking: All candidates that were told, with their scores, best first.
        weights: Of each of several tasks; empty if there is one.
    """

    def __init__(
        self,
        executor: Executor,
        study: Study,
        settings: SearchConfig,
        progress: Progress,
        architecture: str | None,
        block_count: int | None,
        guard_contexts: int,
        rope: Mapping[str, Any] | None = None,
    ) -> None:
        """Take what `run_search` was given."""
        self.study, self.settings, self.progress = study, settings, progress
        self.architecture, self.block_count = architecture, block_count or executor.n_layer
        self.guard_contexts, self.rope = guard_contexts, rope
        self.weights = task_weights(study.config)
        self.start = time.monotonic()
        self.identity: Factors = (1.0,) * executor.n_layer
        self.pipeline = Pipeline(executor, study, progress)
        self.ranking: list[tuple[Candidate, Score]] = []
        straight = tuple((i / settings.degree, 1.0) for i in range(settings.degree + 1))
        self.base = Candidate(-1, Curve(straight, bounds=settings.bounds), self.identity, "identity")

    @property
    def n_tasks(self) -> int:
        """How many tasks take turns."""
        return max(len(self.weights), 1)

    def objective(self, base: Sequence[ContextScore]) -> Objective:
        """Return what candidates are worth on the contexts of ``base``, the base model's scores."""
        return Objective(base, self.settings.middle_weight, self.weights)

    def jobs(self, factors: Factors, split: str, contexts: range | None = None) -> list[Job]:
        """Return the evaluations of ``factors`` on ``contexts`` of ``split``; None: on all."""
        if contexts is None:
            contexts = range(self.guard_contexts if split == "guard" else self.settings.n_contexts(split))
        return [Job(factors, split, i) for i in contexts]

    def known(self, factors: Factors, n_contexts: int) -> list[ContextScore] | None:
        """Return the scores on the first ``n_contexts`` search contexts; None as long as one is missing."""
        scores = [self.pipeline.results.get(job) for job in self.jobs(factors, "search", range(n_contexts))]
        known = [score for score in scores if isinstance(score, ContextScore)]
        return known if len(known) == n_contexts else None

    def all_of(self, factors: Factors, split: str) -> list[ContextScore]:
        """Return the scores on all contexts of ``split``, waiting for them."""
        return [score for score in self.pipeline.get(self.jobs(factors, split)) if isinstance(score, ContextScore)]

    def better_than_base(self) -> list[tuple[Candidate, float]]:
        """Return the candidates with their fitness that saw all search contexts and beat the base model, best first."""
        better = []
        for candidate, (contexts, fitness) in self.ranking:
            if contexts < self.settings.n_contexts("search") or not fitness > 0.0:
                break
            better.append((candidate, fitness))
        return better

    def finalists(self) -> tuple[list[Candidate], Candidate | None]:
        """Return who goes on to validation as it stands, best first, and the best uniform factor among them."""
        useful = (c for c, (_, fitness) in self.ranking if fitness > -math.inf)
        uniform = next((c for c in useful if uniform_factor(c) is not None), None)
        finalists = [c for c, _ in self.better_than_base()][: self.settings.finalists]
        if uniform is not None and uniform not in finalists:
            finalists.append(uniform)
        return finalists, uniform

    def nearest(self, levels: Sequence[float]) -> list[Candidate]:
        """Return, for each part of the best gain by search, the candidate nearest to the base model that reaches it.

        Near are small factors' logarithms: a small change moves a model by about their squares.
        """
        better = self.better_than_base()

        def distance(item: tuple[Candidate, float]) -> float:
            return math.fsum(math.log(factor) ** 2 for factor in item[0].factors)

        reached = [[item for item in better if item[1] >= level * better[0][1]] for level in levels if better]
        return list(dict.fromkeys(min(items, key=distance)[0] for items in reached))

    def document(self, best: Candidate, results: dict[str, Any]) -> CurveFile:
        """Return the curve file of ``best``: no times in it, so that a resumed search writes the same bytes."""
        rope = {} if self.rope is None else {"rope": self.rope}
        return CurveFile(
            control_points=best.control_points,
            layer_factors=best.factors,
            bounds=self.settings.bounds,
            architecture=self.architecture,
            block_count=self.block_count,
            provenance={"config": self.study.config, **rope, "results": results},
        )
