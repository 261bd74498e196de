"""The second phase of a search: the winner on validation contexts, its gain on test contexts, the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lrope_gguf.curve import CurveFile

from ..optimizers.protocol import Candidate, Score
from ..results.comparison import Comparison, compare
from ..results.findings import Findings, GuardFinding, Stage, Uniform
from ..results.front import Front
from ..results.summary import StudySummary, Trial, summarise
from ..results.table import DepthTable, depth_table
from ..results.verdict import Verdict
from .plan import NEARER
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


def conclude(run: Run, stopped_by: str) -> SearchOutcome:
    """Choose on validation and by the guard, measure on test, write down what was found."""
    finalists, uniform = run.finalists(NEARER if run.guard_contexts else ())
    front = _choose(run, finalists, uniform)
    by_factors = {candidate.factors: candidate for candidate, _ in run.ranking}
    winner = None if front.choice is None else by_factors[front.choice.factors]
    table, over_uniform = _measure(run, winner, uniform)
    findings = _findings(run, front, winner, uniform, stopped_by).measured(table, over_uniform)
    document = run.save(winner or run.base, findings)
    trials = [
        Trial(c.id, c.origin, c.factors, c.control_points, *score)
        for c, score in sorted(run.ranking, key=lambda item: item[0].id)
    ]
    # in the order of config.json, as a report shows it
    config = json.loads(json.dumps(run.study.config, sort_keys=True))
    summary = summarise(
        run.study.directory, config, document, run.study.results, trials, run.scales, findings=findings, table=table
    )
    return SearchOutcome(summary, winner, uniform, tuple(run.ranking), stopped_by)


def _choose(run: Run, finalists: Sequence[Candidate], uniform: Candidate | None) -> Front:
    """Validate, look at ordinary text, and return gain against KL, whose choice is the best that the guard lets pass.

    The winner must beat the base model. Beside the finalists, a guard looks
    at the candidates nearest to the base model that reach a good part of the best one's gain: where the best stray too
    far, one of them takes their place. Where these do too, nearer ones still are asked.
    """
    run.announce(finalists, uniform)
    fitness = run.validate(finalists)
    front = run.front(fitness)
    for candidate in run.nearest(_NEARER_STILL) if run.guard_contexts else ():
        if front.choice is not None or not front.passed_over:
            break
        if candidate not in fitness:
            run.expect(len(fitness) + 1, uniform)
            fitness |= run.validate([candidate])
            front = run.front(fitness)
    for point in front.passed_over:
        candidate = next(c for c in fitness if c.factors == point.factors)
        run.progress.line(
            f"candidate {candidate.id} is passed over: it changes ordinary text by {point.kl:.3g} nats a token, more "
            f"than --max-kl {front.limit:g}"
        )
    return front


def _measure(run: Run, winner: Candidate | None, uniform: Candidate | None) -> tuple[DepthTable, Comparison | None]:
    """Ask the look's test contexts under the base model, the best uniform factor and the winner; compare them."""
    beside = _uniform(uniform)
    name = "" if beside is None else beside.name
    named = {"base": run.base, name: uniform, "curve": winner}
    sides = run.test({side: candidate for side, candidate in named.items() if candidate is not None})
    options: dict[str, Any] = {"seed": run.settings.seed, "confidence": run.look.confidence, "weights": run.weights}
    over_uniform = None
    if uniform is not None and winner not in (None, uniform):
        over_uniform = compare(sides[name], sides["curve"], **options)
    return depth_table(sides, **options), over_uniform


def _findings(run: Run, front: Front, winner: Candidate | None, uniform: Candidate | None, stopped_by: str) -> Findings:
    """Return what is known before the test is counted in."""
    point = front.choice
    contexts, fitness = dict(run.ranking).get(winner or run.base, (run.settings.n_contexts("search"), 0.0))
    guard = None
    if run.guard_contexts and (point is not None or front.passed_over):
        lengths = () if point is None else (round(point.short, 6), round(point.long, 6))
        guard = GuardFinding(run.settings.max_kl, len(front.passed_over), *lengths)
    return Findings(
        factors=(winner or run.base).factors,
        candidates=len(run.ranking),
        stopped_by=stopped_by,
        search=Stage(contexts, round(fitness, 6)),
        validation=Stage(run.settings.n_contexts("validation"), 0.0 if point is None else round(point.gain, 6)),
        look=run.look,
        uniform=_uniform(uniform),
        guard=guard,
    )


def _uniform(candidate: Candidate | None) -> Uniform | None:
    return None if candidate is None else Uniform(uniform_factor(candidate) or 1.0, candidate.factors)
