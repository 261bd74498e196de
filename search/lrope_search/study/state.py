"""What the two phases of a search share: who is evaluated on what, and who leads."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lrope_gguf.curve import Curve, CurveFile

from ..config import SearchConfig
from ..optimizers.protocol import Candidate, Score
from ..results.findings import Findings, Look
from ..results.front import Front, FrontPoint
from ..results.guard import divergences_by_length
from ..results.objective import Objective, task_scales, unit_of
from ..results.summary import task_weights
from ..scores import GUARD, ContextScore, DivergenceScore, Factors, Job
from ..workers.protocol import Executor
from .looks import Looks
from .progress import Progress
from .scheduler import Pipeline, Urgency
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
        look: Which test contexts are asked: those of the next look, until the search has ended and knows its own.
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
        test_size: int | None = None,
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
        self.looks = Looks(study, settings.n_contexts("test"), test_size, settings.confidence)
        self.look: Look = self.looks.next()
        self._scales = self._kept_scales()

    @property
    def n_tasks(self) -> int:
        """How many tasks take turns."""
        return max(len(self.weights), 1)

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each of several tasks (`task_scales`) on search contexts; empty if there is one task.

        They are kept in the study: ``objective.json``.
        """
        if self._scales is None:
            self._scales = task_scales(self.all_of(self.identity, "search"))
            self.study.keep("objective", {"scales": self._scales})
        return self._scales

    @property
    def unit(self) -> str:
        """The unit of fitness, in words."""
        return unit_of(self._scales)

    def objective(self, base: Sequence[ContextScore]) -> Objective:
        """Return what candidates are worth on the contexts of ``base``, the base model's scores."""
        return Objective(base, self.settings.middle_weight, self.weights, self.scales)

    def jobs(self, factors: Factors, split: str, contexts: range | None = None) -> list[Job]:
        """Return the evaluations of ``factors`` on ``contexts`` of ``split``; None: on all, or those of the look."""
        if contexts is None:
            n = self.guard_contexts if split == GUARD else self.settings.n_contexts(split)
            contexts = self.look.contexts if split == "test" else range(n)
        return [Job(factors, split, i) for i in contexts]

    def want(self, sides: Iterable[Candidate], split: str, urgency: Urgency = Urgency.NOW, order: int = 0) -> None:
        """Have ``sides`` evaluated on all contexts of ``split``, one after the other from ``order`` on."""
        for place, side in enumerate(sides, start=order):
            self.pipeline.want(self.jobs(side.factors, split), urgency, place)

    def known(self, factors: Factors, n_contexts: int) -> list[ContextScore] | None:
        """Return the scores on the first ``n_contexts`` search contexts; None as long as one is missing."""
        scores = [self.pipeline.results.get(job) for job in self.jobs(factors, "search", range(n_contexts))]
        known = [score for score in scores if isinstance(score, ContextScore)]
        return known if len(known) == n_contexts else None

    def all_of(self, factors: Factors, split: str) -> list[ContextScore]:
        """Return the scores on all contexts of ``split``, waiting for them."""
        return [score for score in self.pipeline.get(self.jobs(factors, split)) if isinstance(score, ContextScore)]

    def divergences(self, factors: Factors) -> list[DivergenceScore]:
        """Return how far ``factors`` stray on ordinary text, waiting for it."""
        return [score for score in self.pipeline.get(self.jobs(factors, GUARD)) if isinstance(score, DivergenceScore)]

    def better_than_base(self) -> list[tuple[Candidate, float]]:
        """Return the candidates with their fitness that saw all search contexts and beat the base model, best first."""
        better = []
        for candidate, (contexts, fitness) in self.ranking:
            if contexts < self.settings.n_contexts("search") or not fitness > 0.0:
                break
            better.append((candidate, fitness))
        return better

    def finalists(self, levels: Sequence[float] = ()) -> tuple[list[Candidate], Candidate | None]:
        """Return who goes on to validation as it stands, best first, and the best uniform factor among them.

        ``levels``: with those that are `nearest` to the base model at these.
        """
        useful = (c for c, (_, fitness) in self.ranking if fitness > -math.inf)
        uniform = next((c for c in useful if uniform_factor(c) is not None), None)
        finalists = [c for c, _ in self.better_than_base()][: self.settings.finalists]
        if uniform is not None and uniform not in finalists:
            finalists.append(uniform)
        return list(dict.fromkeys([*finalists, *self.nearest(levels)])), uniform

    def nearest(self, levels: Sequence[float]) -> list[Candidate]:
        """Return, for each part of the best gain by search, the candidate nearest to the base model that reaches it.

        Near are small factors' logarithms: a small change moves a model by about their squares.
        """
        better = self.better_than_base()

        def distance(item: tuple[Candidate, float]) -> float:
            return math.fsum(math.log(factor) ** 2 for factor in item[0].factors)

        reached = [[item for item in better if item[1] >= level * better[0][1]] for level in levels if better]
        return list(dict.fromkeys(min(items, key=distance)[0] for items in reached))

    def expect(self, n_validated: int, uniform: Candidate | None) -> None:
        """Say how many evaluations it will be in all."""
        self.progress.expect(
            sum(job.split == "search" for job in self.pipeline.results)
            + (1 + n_validated) * self.settings.n_contexts("validation")
            + n_validated * self.guard_contexts
            + (1 + (uniform is not None) + bool(n_validated)) * self.settings.n_contexts("test")
        )

    def announce(self, finalists: Sequence[Candidate], uniform: Candidate | None) -> None:
        """Say how far it is, and let workers that would idle begin with what validation and test will need."""
        self.expect(len(finalists), uniform)
        contexts = self.settings.n_contexts("validation")
        self.progress.line(
            f"validation: base and {len(finalists)} finalists on {contexts} contexts, {self.progress.status()}"
        )
        self.want([self.base, *finalists], "validation")
        self.want(finalists, GUARD, Urgency.SOON)
        if uniform is not None:
            self.want([uniform], "test", Urgency.SOON, 1)

    def validate(self, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
        """Return each candidate's fitness on validation contexts."""
        objective = self.objective(self.all_of(self.identity, "validation"))
        return {c: objective.fitness(self.all_of(c.factors, "validation")) for c in candidates}

    def front(self, fitness: Mapping[Candidate, float]) -> Front:
        """Return gain against KL of all that were validated, waiting for the guard; without one, KL is not limited."""
        points = []
        for order, candidate in enumerate(sorted(fitness, key=lambda c: -fitness[c])):
            if self.guard_contexts and fitness[candidate] > 0.0:
                self.want([candidate], "test", Urgency.MAYBE, order)
            kl = divergences_by_length(self.divergences(candidate.factors)) or {"short": 0.0, "long": 0.0}
            points.append(FrontPoint(candidate.factors, fitness[candidate], **kl))
        return Front.of(points, self.settings.max_kl if self.guard_contexts else math.inf)

    def test(self, sides: Mapping[str, Candidate]) -> dict[str, list[ContextScore]]:
        """Return the scores of ``sides`` on the test contexts of the look that the search now has come to."""
        self.look = self.looks.after(len(self.ranking))
        n = self.settings.n_contexts("test")
        others = len(set(sides.values())) - 1
        self.progress.line(f"test: base and {others} more on {n} contexts, {self.progress.status()}")
        self.want(sides.values(), "test")
        return {name: self.all_of(side.factors, "test") for name, side in sides.items()}

    def save(self, best: Candidate, findings: Findings) -> CurveFile:
        """Write down what was found: the look is spent, and ``best.json`` final."""
        results = findings.to_json()
        self.looks.spend(len(self.ranking))
        document = self.document(best, results)
        self.study.save_best(document)
        self.study.log(str(results["verdict"]))
        return document

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

    def _kept_scales(self) -> dict[str, float] | None:
        """Return the scales if the study has them or needs none, for there is one task; None: they are to be measured.

        An older study, which has candidates and no scales, goes on as it began: with nats of all tasks alike.
        """
        directory = self.study.directory
        if self.n_tasks == 1:
            return {}
        kept = Study.kept(directory, "objective")
        if kept is None and (path := directory / "candidates.jsonl").exists() and path.stat().st_size:
            kept = {"scales": {}}
            self.study.keep("objective", kept)
        return None if kept is None else dict(kept["scales"])
