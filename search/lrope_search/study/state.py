"""State that both phases of a search share: evaluations, ranking, and the choice of the winner."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrope_gguf.curve import Curve, CurveFile

from ..optimizers.protocol import Candidate, Score
from ..results.findings import Look, Uniform
from ..results.front import Front, FrontPoint
from ..results.objective import Objective, task_scales, unit_of
from ..results.summary import task_weights
from ..scores import GUARD, ContextScore, DivergenceScore, Factors, Job, n_changed, numbers_of, rows_of
from ..workers.protocol import Executor
from .looks import Looks
from .plan import NEARER, SPARSE
from .progress import Progress
from .scheduler import Pipeline, Urgency
from .settings import SearchConfig
from .store import Study

_NEARER_STILL = (0.25, 0.125)
"""As `NEARER`, where all of these exceed the guard's limit."""


def uniform_factor(candidate: Candidate) -> float | None:
    """Return the factor of a uniform scaling (of the layers that are searched); None if it is none."""
    moved = {factor for factor in candidate.factors if factor != 1.0}
    whole = len(set(candidate.factors)) == 1
    return moved.pop() if len(moved) == 1 and (whole or candidate.origin == "uniform") else None


def _distance(factors: Factors) -> float:
    """Return how far factors are from the base model: a small change moves a model by about the logarithms' squares."""
    return math.fsum(math.log(value) ** 2 for value in numbers_of(factors))


@dataclass(frozen=True)
class Choice:
    """What validation and guard say: the winner, if any, and gain against KL; beside it the best uniform factor."""

    winner: Candidate | None
    point: FrontPoint | None
    """The winner's."""
    front: Front
    uniform: Candidate | None
    uniform_side: Uniform | None


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
        ascent: Mapping[str, Any] | None = None,
        begun: float | None = None,
    ) -> None:
        self.study, self.settings, self.progress = study, settings, progress
        self.architecture, self.block_count = architecture, block_count or executor.n_layer
        self.guard_contexts, self.rope, self.ascent = guard_contexts, rope, ascent
        self.weights = task_weights(study.config)
        self.start = time.monotonic() if begun is None else begun
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

    def finalists(self, levels: Sequence[float] = ()) -> tuple[list[Candidate], Candidate | None]:
        """Return who goes on to validation as it stands, best first, and the best uniform factor among them.

        ``levels``: with those that are `nearest` to the base model at these. Where heads have their own, with those
        that change the fewest (`SPARSE`).
        """
        useful = (c for c, (_, fitness) in self.ranking if fitness > -math.inf)
        uniform = next((c for c in useful if uniform_factor(c) is not None), None)
        finalists = [c for c, _ in self.better_than_base()][: self.settings.finalists]
        if uniform is not None and uniform not in finalists:
            finalists.append(uniform)
        if finalists and rows_of(finalists[0].factors):
            finalists += self.nearest(SPARSE, n_changed)
        return list(dict.fromkeys([*finalists, *self.nearest(levels)])), uniform

    def nearest(self, levels: Sequence[float], distance: Callable[[Factors], float] = _distance) -> list[Candidate]:
        """Return, for each part of the best gain by search, the candidate nearest to the base model that reaches it."""
        better = self.better_than_base()
        reached = [[item for item in better if item[1] >= level * better[0][1]] for level in levels if better]
        return list(dict.fromkeys(min(items, key=lambda item: distance(item[0].factors))[0] for items in reached))

    def choose(self) -> Choice:
        """Validate, look at ordinary text, and choose the best that the guard lets pass, if it beats the base model.

        Beside the finalists, a guard looks at the candidates nearest to the base model that reach a good part of the
        best one's gain: where the best exceed the limit, one of them takes their place. Where these do too, nearer ones
        still are asked. Where heads have their own, the best is the one that changes the fewest numbers of all that are
        within a standard error of it.
        """
        finalists, uniform = self.finalists(NEARER if self.guard_contexts else ())
        self._announce(finalists, uniform)
        gains = self._validate(finalists)
        front = self._front(gains)
        for candidate in self.nearest(_NEARER_STILL) if self.guard_contexts else ():
            if front.choice is not None or not front.passed_over:
                break
            if candidate.factors not in gains:
                self._expect(len(gains) + 1, uniform)
                gains |= self._validate([candidate])
                front = self._front(gains)
        candidates = {candidate.factors: candidate for candidate, _ in self.ranking}
        for point in front.passed_over:
            self.progress.line(
                f"candidate {candidates[point.factors].id} is rejected: its KL divergence on ordinary text, "
                f"{point.kl:.3g} nats per token, is above --max-kl {front.limit:g}"
            )
        side = None if uniform is None else Uniform(uniform_factor(uniform) or 1.0, uniform.factors)
        chosen = self._sparsest(front)
        return Choice(None if chosen is None else candidates[chosen.factors], chosen, front, uniform, side)

    def _sparsest(self, front: Front) -> FrontPoint | None:
        best = front.choice
        if best is None or not rows_of(best.factors):
            return best
        objective = self.objective(self.all_of(self.identity, "validation"))
        scores = self.all_of(best.factors, "validation")

        def as_good(point: FrontPoint) -> bool:
            lead, error = objective.lead(scores, self.all_of(point.factors, "validation"))
            return math.isfinite(error) and lead <= error

        passed = [point for point in front.points if point.gain > 0.0 and point.kl <= front.limit]
        return min((p for p in passed if p == best or as_good(p)), key=lambda p: (n_changed(p.factors), -p.gain))

    def _expect(self, n_validated: int, uniform: Candidate | None) -> None:
        """Say how many evaluations it will be in all."""
        self.progress.expect(
            sum(job.split == "search" for job in self.pipeline.results)
            + (1 + n_validated) * self.settings.n_contexts("validation")
            + n_validated * self.guard_contexts
            + (1 + (uniform is not None) + bool(n_validated)) * self.settings.n_contexts("test")
        )

    def _announce(self, finalists: Sequence[Candidate], uniform: Candidate | None) -> None:
        """Say how far it is, and let workers that would idle begin with what comes later."""
        self._expect(len(finalists), uniform)
        contexts = self.settings.n_contexts("validation")
        self.progress.line(
            f"validation: base and {len(finalists)} finalists on {contexts} contexts, {self.progress.status()}"
        )
        self._want([self.base, *finalists], "validation")
        self._want(finalists, GUARD, Urgency.SOON)
        if uniform is not None:
            self._want([uniform], "test", Urgency.SOON, 1)

    def _want(self, sides: Iterable[Candidate], split: str, urgency: Urgency = Urgency.NOW, order: int = 0) -> None:
        """Have ``sides`` evaluated on all contexts of ``split``."""
        jobs = [job for side in sides for job in self.jobs(side.factors, split)]
        self.pipeline.want(jobs, urgency, order)

    def _validate(self, candidates: Sequence[Candidate]) -> dict[Factors, float]:
        """Return the fitness on validation contexts by factors, the better first."""
        scores = {c.factors: self.all_of(c.factors, "validation") for c in (self.base, *candidates)}
        gains = self.objective(scores.pop(self.identity)).of_all(scores)
        return dict(sorted(gains.items(), key=lambda gain: -gain[1]))

    def _front(self, gains: Mapping[Factors, float]) -> Front:
        """Return gain against KL of all that were validated, waiting for the guard."""
        divergences = {}
        for order, (factors, gain) in enumerate(gains.items()):
            if self.guard_contexts and gain > 0.0:
                self.pipeline.want(self.jobs(factors, "test"), Urgency.MAYBE, order)
            found = self.pipeline.get(self.jobs(factors, GUARD))
            divergences[factors] = [score for score in found if isinstance(score, DivergenceScore)]
        return Front.of_scores(gains, divergences, self.settings.max_kl)

    def test(self, sides: Mapping[str, Candidate]) -> dict[str, list[ContextScore]]:
        """Return the scores of ``sides`` on the test contexts of the look that the search now has come to."""
        self.look = self.looks.after(len(self.ranking))
        n, others = self.settings.n_contexts("test"), len(set(sides.values())) - 1
        self.progress.line(f"test: base and {others} more on {n} contexts, {self.progress.status()}")
        self._want(sides.values(), "test")
        return {name: self.all_of(side.factors, "test") for name, side in sides.items()}

    def save(self, best: Candidate, results: dict[str, Any]) -> CurveFile:
        """Write down what was found: the look is spent, and ``best.json`` final."""
        document = self.document(best, results)
        self.looks.spend(len(self.ranking))
        self.study.save_best(document)
        self.study.log(str(results["verdict"]))
        return document

    def document(self, best: Candidate, results: dict[str, Any]) -> CurveFile:
        """Return the curve file of ``best``: no times in it, so that a resumed search writes the same bytes."""
        more = {"rope": self.rope, "gradient": self.ascent}
        known = {name: value for name, value in more.items() if value is not None}
        rows: Any = rows_of(best.factors)
        return CurveFile(
            control_points=best.control_points,
            layer_factors=None if rows and set(best.factors) == {1.0} else tuple(best.factors),
            **rows,
            bounds=self.settings.bounds,
            architecture=self.architecture,
            block_count=self.block_count,
            provenance={"config": self.study.config, **known, "results": results},
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
