"""The second phase of a search: the winner on validation contexts, its gain on test contexts, the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrope_gguf.curve import CurveFile

from ..optimizers.protocol import Candidate, Score
from ..results.comparison import Comparison, compare
from ..results.front import Front, FrontPoint
from ..results.guard import divergences_by_length
from ..results.intervals import finite
from ..results.objective import Objective
from ..results.summary import StudySummary, Trial, summarise
from ..results.table import DepthTable, depth_table
from ..results.verdict import Verdict, verdict
from ..scores import GUARD, DivergenceScore
from .plan import NEARER
from .scheduler import Urgency
from .state import Run, uniform_factor

_NEARER_STILL = (0.25, 0.125)
"""As `NEARER`, for where all of these stray too far."""


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found: its summary, and the optimizer's view that no study keeps.

    Attributes:
        summary: The study, as every report shows it.
        winner: The winner on validation; None if that was the base model.
        uniform: The best uniform factor on search contexts; None if none was tried.
        candidates: Every candidate evaluated with its score, best first.
        stopped_by: ``evaluations``, ``converged`` or ``hours``.
    """

    summary: StudySummary
    winner: Candidate | None
    uniform: Candidate | None
    candidates: tuple[tuple[Candidate, Score], ...]
    stopped_by: str

    @property
    def best(self) -> CurveFile:
        """The document that ``best.json`` holds."""
        assert self.summary.best is not None  # of a search that has ended
        return self.summary.best

    def text(self) -> str:
        """Return the test by depth and the verdict."""
        return f"{self.summary.table}\n\n{self.summary.verdict}"

    @property
    def verdict(self) -> Verdict:
        """Whether to use the curve."""
        return Verdict(self.summary.recommended, self.summary.verdict)


@dataclass(frozen=True)
class _Choice:
    """What validation and guard say: the winner, if any, everybody's fitness, and gain against KL."""

    winner: Candidate | None
    fitness: Mapping[Candidate, float]
    front: Front | None
    """None without a guard."""

    def kl(self, candidate: Candidate | None) -> FrontPoint | None:
        """Return what is known of a candidate's KL divergence."""
        points = () if candidate is None or self.front is None else self.front.points
        return next((point for point in points if candidate and point.factors == candidate.factors), None)


@dataclass(frozen=True)
class _Test:
    """What the test contexts say."""

    table: DepthTable
    uniform: tuple[float, Comparison] | None
    over_uniform: Comparison | None

    @property
    def curve(self) -> Comparison | None:
        """The winner against the base model; None if there is no winner."""
        return self.table.comparisons.get("curve")

    @property
    def tasks(self) -> dict[str, Comparison]:
        """The same for each of several tasks."""
        tables = self.table.tasks if self.curve is not None else {}
        return {name: table.comparisons["curve"] for name, table in tables.items()}


def conclude(run: Run, stopped_by: str) -> SearchOutcome:
    """Choose on validation and by the guard, measure on test."""
    finalists, uniform = run.finalists()
    choice = _choose(run, finalists, uniform)
    test = _measure(run, choice.winner, uniform)
    judgement = _judge(run, choice, test)
    document = run.document(choice.winner or run.base, _results(run, choice, test, judgement, stopped_by))
    run.study.save_best(document)
    run.study.log(judgement.text)
    trials = [
        Trial(c.id, c.origin, c.factors, c.control_points, *score)
        for c, score in sorted(run.ranking, key=lambda item: item[0].id)
    ]
    # in the order of config.json, as a report shows it
    config = json.loads(json.dumps(run.study.config, sort_keys=True))
    summary = summarise(run.study.directory, config, document, run.study.results, trials, test.table)
    return SearchOutcome(summary, choice.winner, uniform, tuple(run.ranking), stopped_by)


def _choose(run: Run, finalists: Sequence[Candidate], uniform: Candidate | None) -> _Choice:
    """Validate, look at ordinary text, and return the best that the guard lets pass.

    The winner must beat the base model. Beside the finalists, a guard looks
    at the candidates nearest to the base model that reach a good part of the best one's gain: where the best stray too
    far, one of them takes their place. Where these do too, nearer ones still are asked.
    """
    levels = NEARER if run.guard_contexts else ()
    asked = [*finalists, *(c for c in run.nearest(levels) if c not in finalists)]
    _announce(run, asked, uniform)
    run.pipeline.want(run.jobs(run.identity, "validation"))
    objective = run.objective(run.all_of(run.identity, "validation"))
    fitness = _validate(run, asked, objective)
    if not run.guard_contexts:
        winner = max(asked, key=lambda c: fitness[c], default=None)
        return _Choice(winner if winner is not None and fitness[winner] > 0.0 else None, fitness, None)
    front = _front(run, fitness)
    for candidate in run.nearest(_NEARER_STILL):
        if front.choice is not None or not front.passed_over:
            break
        if candidate not in fitness:
            _expect(run, len(fitness) + 1, uniform)
            fitness |= _validate(run, [candidate], objective)
            front = _front(run, fitness)
    by_factors = {candidate.factors: candidate for candidate in fitness}
    for point in front.passed_over:
        run.progress.line(
            f"candidate {by_factors[point.factors].id} is passed over: KL divergence {point.kl:.3g} on ordinary text "
            f"exceeds --max-kl {front.limit:g}"
        )
    return _Choice(None if front.choice is None else by_factors[front.choice.factors], fitness, front)


def _announce(run: Run, asked: Sequence[Candidate], uniform: Candidate | None) -> None:
    """Say how far it is, and let workers that would idle begin with what comes later."""
    _expect(run, len(asked), uniform)
    run.progress.line(
        f"validation: base and {len(asked)} finalists on {run.settings.n_contexts('validation')} contexts, "
        f"{run.progress.status()}"
    )
    for candidate in (run.base, *asked):
        run.pipeline.want(run.jobs(candidate.factors, "validation"))
    for candidate in asked:
        run.pipeline.want(run.jobs(candidate.factors, GUARD), Urgency.SOON)
    if uniform is not None:
        run.pipeline.want(run.jobs(uniform.factors, "test"), Urgency.SOON, 1)


def _expect(run: Run, n_validated: int, uniform: Candidate | None) -> None:
    """Say how many evaluations it will be in all."""
    settings = run.settings
    n_test = 1 + (uniform is not None) + bool(n_validated)
    run.progress.expect(
        sum(job.split == "search" for job in run.pipeline.results)
        + (1 + n_validated) * settings.n_contexts("validation")
        + n_validated * run.guard_contexts
        + n_test * settings.n_contexts("test")
    )


def _validate(run: Run, candidates: Sequence[Candidate], objective: Objective) -> dict[Candidate, float]:
    """Return each candidate's fitness on validation contexts."""
    return {c: objective.fitness(run.all_of(c.factors, "validation")) for c in candidates}


def _front(run: Run, fitness: Mapping[Candidate, float]) -> Front:
    """Return gain against KL of all that were validated, waiting for the guard."""
    points = []
    for order, candidate in enumerate(sorted(fitness, key=lambda c: -fitness[c])):
        if fitness[candidate] > 0.0:
            run.pipeline.want(run.jobs(candidate.factors, "test"), Urgency.MAYBE, order)
        scores = run.pipeline.get(run.jobs(candidate.factors, GUARD))
        kl = divergences_by_length(score for score in scores if isinstance(score, DivergenceScore))
        points.append(FrontPoint(candidate.factors, fitness[candidate], **kl))
    return Front.of(points, run.settings.max_kl)


def _measure(run: Run, winner: Candidate | None, uniform: Candidate | None) -> _Test:
    """Ask the test contexts under the base model, the best uniform factor and the winner."""
    settings = run.settings
    sides = [c.factors for c in (uniform, winner) if c is not None]
    run.progress.line(
        f"test: base and {len(set(sides))} more on {settings.n_contexts('test')} contexts, {run.progress.status()}"
    )
    for side in (run.identity, *sides):
        run.pipeline.want(run.jobs(side, "test"))
    scores = {"base": run.all_of(run.identity, "test")}
    factor = None if uniform is None else uniform_factor(uniform) or 1.0
    beside = "" if factor is None else f"uniform {factor:g}"
    if uniform is not None:
        scores[beside] = run.all_of(uniform.factors, "test")
    if winner is not None:
        scores["curve"] = run.all_of(winner.factors, "test")
    options: dict[str, Any] = {"seed": settings.seed, "confidence": settings.confidence, "weights": run.weights}
    table = depth_table(scores, **options)
    over_uniform = None
    if uniform is not None and winner not in (None, uniform):
        over_uniform = compare(scores[beside], scores["curve"], **options)
    return _Test(table, None if factor is None else (factor, table.comparisons[beside]), over_uniform)


def _judge(run: Run, choice: _Choice, test: _Test) -> Verdict:
    """Return the verdict."""
    if choice.winner is None and choice.front is not None and choice.front.passed_over:
        return Verdict(
            False,
            f"no curve that beats the base model on validation stays within {run.settings.max_kl:g} nats a token of it "
            "on ordinary text (--max-kl), not recommended",
        )
    point = choice.kl(choice.winner)
    kl = None if point is None else point.kl
    return verdict(test.curve, test.uniform, kl, over_uniform=test.over_uniform, tasks=test.tasks)


def _results(run: Run, choice: _Choice, test: _Test, judgement: Verdict, stopped_by: str) -> dict[str, Any]:
    """Return what ``best.json`` tells of the search."""
    settings, best = run.settings, choice.winner or run.base
    contexts, search_fitness = dict(run.ranking).get(best, (settings.n_contexts("search"), 0.0))
    base_alone = {"contexts": test.table.n_contexts, "base_accuracy": finite(test.table.totals["base"].accuracy, 6)}
    results: dict[str, Any] = {
        "candidates": len(run.ranking),
        "stopped_by": stopped_by,
        "search": {"contexts": contexts, "fitness": finite(search_fitness, 6)},
        "validation": {
            "contexts": settings.n_contexts("validation"),
            "fitness": finite(choice.fitness.get(best, 0.0), 6),
        },
        "test": base_alone if test.curve is None else test.curve.to_json(),
        "recommended": judgement.recommended,
        "verdict": judgement.text,
    }
    if test.tasks:
        weights = run.weights
        results["test"]["tasks"] = {
            name: {"weight": weights[name], **gain.to_json()} for name, gain in test.tasks.items()
        }
    if test.uniform is not None:
        results["best_uniform"] = {"factor": test.uniform[0], "test": test.uniform[1].to_json()}
    if test.over_uniform is not None:
        results["over_uniform"] = test.over_uniform.to_json()
    if choice.front is not None and (choice.winner is not None or choice.front.passed_over):
        results["guard"] = {"max_kl": settings.max_kl, "passed_over": len(choice.front.passed_over)}
        if (point := choice.kl(choice.winner)) is not None:
            results["guard"] |= {"short": finite(point.short, 6), "long": finite(point.long, 6)}
    return results
