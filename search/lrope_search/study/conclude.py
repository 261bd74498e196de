"""The second phase of a search: the winner on validation contexts, its gain on test contexts, the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrope_gguf.curve import CurveFile

from ..optimizers.protocol import Candidate, Score
from ..results.comparison import compare, finite
from ..results.guard import divergences_by_length
from ..results.summary import StudySummary, Trial, summarise
from ..results.table import depth_table
from ..results.verdict import Verdict, verdict
from ..scores import GUARD, DivergenceScore
from .scheduler import Urgency
from .state import Run, uniform_factor


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


def conclude(run: Run, stopped_by: str) -> SearchOutcome:
    """Choose on validation, measure on test."""
    settings = run.settings
    finalists, uniform = run.finalists()
    n_test = 1 + (uniform is not None) + bool(finalists)
    run.progress.expect(
        sum(job.split == "search" for job in run.pipeline.results)
        + (1 + len(finalists)) * settings.validation_contexts
        + bool(finalists) * run.guard_contexts
        + n_test * settings.test_contexts
    )
    run.progress.line(
        f"validation: base and {len(finalists)} finalists on {settings.validation_contexts} contexts, "
        f"{run.progress.status()}"
    )
    for candidate in (run.base, *finalists):
        run.pipeline.want(run.jobs(candidate.factors, "validation"))
    if uniform is not None:
        run.pipeline.want(run.jobs(uniform.factors, "test"), Urgency.SOON)
    for order, candidate in enumerate(finalists):
        run.pipeline.want(run.jobs(candidate.factors, "guard"), Urgency.MAYBE, order)
    objective = run.objective(run.all_of(run.identity, "validation"))
    fitness = {c: objective.fitness(run.all_of(c.factors, "validation")) for c in finalists}
    winner, divergences = _choose(run, finalists, fitness)

    sides = [c.factors for c in (uniform, winner) if c is not None]
    run.progress.line(
        f"test: base and {len(set(sides))} more on {settings.test_contexts} contexts, {run.progress.status()}"
    )
    for side in (run.identity, *sides):
        run.pipeline.want(run.jobs(side, "test"))
    scores = {"base": run.all_of(run.identity, "test")}
    if uniform is not None:
        factor = uniform_factor(uniform) or 1.0
        beside = f"uniform {factor:g}"
        scores[beside] = run.all_of(uniform.factors, "test")
    if winner is not None:
        scores["curve"] = run.all_of(winner.factors, "test")
    table = depth_table(scores, seed=settings.seed, confidence=settings.confidence, weights=run.weights)
    curve_gain = table.comparisons.get("curve")
    uniform_gain = over_uniform = None
    if uniform is not None:
        uniform_gain = factor, table.comparisons[beside]
        if winner not in (None, uniform):
            over_uniform = compare(
                scores[beside],
                scores["curve"],
                seed=settings.seed,
                confidence=settings.confidence,
                weights=run.weights,
            )
    kl = None if winner is None or winner not in divergences else max(divergences[winner].values())
    tasks = {} if curve_gain is None else {name: part.comparisons["curve"] for name, part in table.tasks.items()}
    judgement = verdict(curve_gain, uniform_gain, kl, over_uniform=over_uniform, tasks=tasks)
    if winner is None and divergences:
        judgement = Verdict(
            False,
            f"no curve that beats the base model on validation stays within {settings.max_kl:g} nats a token of it "
            "on ordinary text (--max-kl), not recommended",
        )
    best = winner or run.base
    contexts, search_fitness = dict(run.ranking).get(best, (settings.search_contexts, 0.0))
    base_alone = {"contexts": table.n_contexts, "base_accuracy": finite(table.totals["base"].accuracy, 6)}
    results: dict[str, Any] = {
        "candidates": len(run.ranking),
        "stopped_by": stopped_by,
        "search": {"contexts": contexts, "fitness": finite(search_fitness, 6)},
        "validation": {"contexts": settings.validation_contexts, "fitness": finite(fitness.get(best, 0.0), 6)},
        "test": base_alone if curve_gain is None else curve_gain.json(),
        "recommended": judgement.recommended,
        "verdict": judgement.text,
    }
    if tasks:
        results["test"]["tasks"] = {name: {"weight": run.weights[name], **gain.json()} for name, gain in tasks.items()}
    if uniform_gain is not None:
        results["best_uniform"] = {"factor": uniform_gain[0], "test": uniform_gain[1].json()}
    if over_uniform is not None:
        results["over_uniform"] = over_uniform.json()
    if divergences:
        results["guard"] = {"max_kl": settings.max_kl, "passed_over": len(divergences) - (winner is not None)}
        if winner is not None:
            results["guard"] |= {name: finite(value, 6) for name, value in divergences[winner].items()}
    document = run.document(best, results)
    run.study.save_best(document)
    run.study.log(judgement.text)
    trials = [
        Trial(c.id, c.origin, c.factors, c.control_points, *score)
        for c, score in sorted(run.ranking, key=lambda item: item[0].id)
    ]
    # in the order of config.json, as a report shows it
    config = json.loads(json.dumps(run.study.config, sort_keys=True))
    summary = summarise(run.study.directory, config, document, run.study.results, trials, table)
    return SearchOutcome(summary, winner, uniform, tuple(run.ranking), stopped_by)


def _choose(
    run: Run, finalists: Sequence[Candidate], fitness: Mapping[Candidate, float]
) -> tuple[Candidate | None, dict[Candidate, dict[str, float]]]:
    """Return the best by validation that the guard lets pass, and the divergences of those that it looked at.

    The winner must beat the base model; of equals the best by search comes first.
    """
    divergences: dict[Candidate, dict[str, float]] = {}
    for candidate in sorted((c for c in finalists if fitness[c] > 0.0), key=lambda c: -fitness[c]):
        if not run.guard_contexts:
            return candidate, divergences
        run.pipeline.want(run.jobs(candidate.factors, "test"), Urgency.MAYBE)
        scores = run.pipeline.get(run.jobs(candidate.factors, GUARD))
        divergences[candidate] = divergences_by_length(s for s in scores if isinstance(s, DivergenceScore))
        worst, limit = max(divergences[candidate].values()), run.settings.max_kl
        if worst <= limit:
            return candidate, divergences
        run.progress.line(
            f"candidate {candidate.id} is passed over: KL divergence {worst:.3g} on ordinary text exceeds "
            f"--max-kl {limit:g}"
        )
    return None, divergences
