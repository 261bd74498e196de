"""The second phase of a search: the winner on validation contexts, its gain on test contexts, the verdict."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lrope_gguf.curve import CurveFile

from ..optimizers.protocol import Candidate, Score
from ..results.findings import Findings, GuardFinding, Stage, Verdict
from ..results.front import Front
from ..results.summary import StudySummary, Trial, summarise
from ..results.table import depth_table
from .ascend import Trail
from .state import Run


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
    """Choose on validation and by the guard, measure on test, write down what was found."""
    choice = run.choose()
    winner, point, guarded = choice.winner, choice.point, bool(run.guard_contexts)
    best, uniform = winner or run.base, choice.uniform_side
    named = {"base": run.base, "" if uniform is None else uniform.name: choice.uniform, "curve": winner}
    sides = run.test({name: side for name, side in named.items() if side is not None})
    table = depth_table(
        sides, seed=run.settings.seed, confidence=run.look.confidence, weights=run.weights,
        over=winner not in (None, choice.uniform),
    )  # fmt: skip
    contexts, fitness = dict(run.ranking).get(best, (run.settings.n_contexts("search"), 0.0))
    kl = () if point is None else (round(point.short, 6), round(point.long, 6))
    findings = Findings(
        factors=best.factors,
        candidates=len(run.ranking),
        stopped_by=stopped_by,
        search=Stage(contexts, round(fitness, 6)),
        validation=Stage(run.settings.n_contexts("validation"), 0.0 if point is None else round(point.gain, 6)),
        look=run.look,
        uniform=uniform,
        guard=GuardFinding(run.settings.max_kl, len(choice.front.passed_over), *kl)
        if guarded and (point is not None or choice.front.passed_over)
        else None,
    ).measured(table)
    document = run.save(best, findings.to_json())
    trials = [
        Trial(c.id, c.origin, c.factors, c.control_points, *score)
        for c, score in sorted(run.ranking, key=lambda item: item[0].id)
    ]
    summary = summarise(
        run.study.directory,
        json.loads(json.dumps(run.study.config, sort_keys=True)),  # in the order of config.json, as a report shows it
        document,
        run.study.results,
        trials,
        run.scales,
        findings,
        findings.search,
        table,
        choice.front if guarded else Front((), run.settings.max_kl),
        Trail.of(run.study.directory).points(),
    )
    return SearchOutcome(summary, winner, choice.uniform, tuple(run.ranking), stopped_by)
