"""The one summary of a study, from the scores in memory or read back: what it tried, found and cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrope_gguf.curve import CurveFile, Point, Rows

from ..scores import LAYER_SCAN, ContextScore, DivergenceScore, Evaluation, Factors, Job, rows_of, tuned
from .findings import Findings, Stage, Uniform
from .front import Front, divergences_by_length
from .intervals import finite
from .objective import unit_of
from .table import DepthTable
from .variation import components

Scores = Mapping[Factors, Mapping[int, ContextScore]]
"""Of one split, by factors and context."""


@dataclass(frozen=True)
class Trial:
    """A candidate and its score: ``contexts`` seen, and fitness in nats per answer token, ``-inf`` if not finite."""

    number: int
    origin: str
    factors: Factors
    control_points: tuple[Point, ...] | None
    contexts: int
    fitness: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.fitness):
            object.__setattr__(self, "fitness", -math.inf)


@dataclass(frozen=True)
class LayerEffect:
    """What moving one layer, or one group of them, did alone.

    ``fitness`` in nats per answer token, ``-inf`` if the model was ruined; ``error``, its standard error by its own
    questions, is NaN where these are too few.
    """

    layers: tuple[int, ...]
    factor: float
    contexts: int
    fitness: float
    error: float

    @property
    def beyond_noise(self) -> bool:
        """Whether it is more than two standard errors from 0."""
        return not math.isfinite(self.fitness) or abs(self.fitness) > 2.0 * self.error


@dataclass(frozen=True)
class Cost:
    """What the evaluations of one phase took: tokens computed, and seconds of work summed over workers."""

    phase: str
    evaluations: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second; NaN where no time was measured."""
        return self.tokens / self.seconds if self.seconds > 0.0 else math.nan

    def json(self) -> dict[str, Any]:
        """Return it with its rate, None where no time was measured."""
        return asdict(self) | {"tokens_per_second": finite(self.rate)}


@dataclass(frozen=True)
class AscentStep:
    """A step that followed derivatives: log-probability of answers by task and KL divergence where it began, in nats.

    Both on contexts and text of its own; and what it took.
    """

    gains: Mapping[str, float]
    divergence: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class StudySummary:
    """A study, finished or not: what text, JSON, page and MLflow show.

    Attributes:
        config: what the search was begun with.
        findings: what it found; None before it has ended.
        searched: what the best so far is worth on search contexts; None before there is one.
        best: the best curve so far; None before there was one.
        factors: its factors, one a layer.
        trials: all candidates with a score, in order of asking.
        search_contexts: how many a candidate sees that is not dropped early.
        unit: of every fitness.
        table: accuracies by depth, on test contexts or, before there are such, on search contexts (``table_split``).
        scan: what single layers, or groups of them, do alone, in order of asking; empty where none was looked at.
        guard: divergence from the base model on ordinary text, in nats per token, by length of the text.
        front: gain against that divergence, of all candidates of which both are known.
        costs: by phase, those that took place.
        ascent: the steps that followed derivatives, before there were candidates.
    """

    directory: Path
    config: dict[str, Any]
    findings: Findings | None
    searched: Stage | None
    best: CurveFile | None
    factors: Factors | None
    trials: tuple[Trial, ...]
    search_contexts: int
    confidence: float
    unit: str
    table: DepthTable | None
    table_split: str
    scan: tuple[LayerEffect, ...]
    guard: dict[str, float]
    front: Front
    costs: tuple[Cost, ...]
    ascent: tuple[AscentStep, ...] = ()

    @property
    def uniform(self) -> Uniform | None:
        """The best uniform factor; None if there is none."""
        return None if self.findings is None else self.findings.uniform

    @property
    def rows(self) -> dict[str, Rows]:
        """What heads have of their own in the best, by its name in a curve file."""
        return {} if self.factors is None else rows_of(self.factors)

    @property
    def finished(self) -> bool:
        """Whether the search has ended with a verdict."""
        return self.findings is not None

    @property
    def recommended(self) -> bool:
        """Whether the verdict recommends the curve."""
        return self.findings is not None and self.findings.verdict.recommended

    @property
    def verdict(self) -> str:
        """The verdict; of an unfinished search, how far it is."""
        if self.findings is not None:
            return self.findings.verdict.text
        best = max((t.fitness for t in self.trials if t.contexts >= self.search_contexts), default=0.0)
        found = f"the best gains {best:+.4f} {self.unit}" if best > 0.0 else "none better than the base model"
        return f"the search has not ended: {len(self.trials)} candidates so far, {found}; the same command resumes it"

    def json(self) -> dict[str, Any]:
        """Return the results of ``best.json`` and what the evaluations add; finite numbers only."""
        searched = {} if self.searched is None else {"search": self.searched.to_json()}
        return (searched if self.findings is None else self.findings.to_json()) | {
            "finished": self.finished,
            "recommended": self.recommended,
            "verdict": self.verdict,
            "candidates": len(self.trials),
            "accuracy": None if self.table is None else {"split": self.table_split, **self.table.json()},
            "kl": self.guard,
            "front": self.front.json(self.factors if self.finished else None),
            "cost": [cost.json() for cost in (*self.costs, self.total)],
        }

    @property
    def total(self) -> Cost:
        """The sum of all phases."""
        return Cost(
            "in all",
            sum(cost.evaluations for cost in self.costs),
            sum(cost.tokens for cost in self.costs),
            math.fsum(cost.seconds for cost in self.costs),
        )

    def best_so_far(self) -> list[float]:
        """Of each trial, the best fitness until then among those that saw all search contexts; the base has 0."""
        whole = (trial.fitness if trial.contexts >= self.search_contexts else 0.0 for trial in self.trials)
        return list(itertools.accumulate(whole, max, initial=0.0))[1:]


def summarise(
    directory: Path,
    config: dict[str, Any],
    best: CurveFile | None,
    evaluations: Mapping[Job, Evaluation],
    trials: Sequence[Trial],
    scales: Mapping[str, float],
    findings: Findings | None,
    searched: Stage | None,
    table: DepthTable | None,
    front: Front,
    ascent: Sequence[AscentStep] = (),
) -> StudySummary:
    """Summarise a study; arguments as in `StudySummary`.

    ``config`` may be any JSON object. ``best`` has the factors that were evaluated, and in its provenance the results.
    ``scales`` are what fitness was scaled by (`task_scales`) where there are several tasks.
    """
    settings, n_layer = section(config, "search"), next((len(job.factors) for job in evaluations), 0)
    factors = None if best is None else factors_of(best, n_layer)
    scores = of_split(evaluations, "search")
    seen = max((len(contexts) for contexts in scores.values()), default=0)
    guard = [s for job, s in evaluations.items() if isinstance(s, DivergenceScore) and job.factors == factors]
    return StudySummary(
        directory=directory,
        config=config,
        findings=findings,
        searched=searched,
        best=best,
        factors=factors,
        trials=tuple(trials),
        search_contexts=int(number(settings.get("search_contexts"), seen)),
        confidence=intended_confidence(config) if findings is None else findings.look.confidence,
        unit=unit_of(scales),
        table=table,
        table_split="search" if findings is None else "test",
        scan=_scan(trials, scores, scales),
        guard=divergences_by_length(guard),
        front=front,
        costs=_costs(evaluations, ascent),
        ascent=tuple(ascent),
    )


def factors_of(best: CurveFile, n_layer: int) -> Factors:
    """Return what was evaluated of a curve file's document, which lists the factors of layers if any is not 1."""
    return tuned(best.layer_factors or (1.0,) * n_layer, best.rows)


def of_split(evaluations: Mapping[Job, Evaluation], split: str) -> Scores:
    """Return the scores on the contexts of ``split``, by factors and context."""
    scores: dict[Factors, dict[int, ContextScore]] = {}
    for job, score in evaluations.items():
        if job.split == split and isinstance(score, ContextScore):
            scores.setdefault(job.factors, {})[job.index] = score
    return scores


def intended_confidence(config: Mapping[str, Any]) -> float:
    """Return that of intervals, as a configuration that may hold anything says it."""
    return min(max(number(section(config, "search").get("confidence"), 0.95), 0.01), 0.9999)


def _scan(trials: Sequence[Trial], searched: Scores, scales: Mapping[str, float]) -> tuple[LayerEffect, ...]:
    effects = []
    for trial in trials:
        base = (1.0,) * len(trial.factors)
        moved = tuple(layer for layer, factor in enumerate(trial.factors) if factor != 1.0)
        if trial.origin == LAYER_SCAN and moved:
            error = _error(searched.get(base, {}), searched.get(trial.factors, {}), scales)
            effects.append(LayerEffect(moved, trial.factors[moved[0]], trial.contexts, trial.fitness, error))
    return tuple(effects)


def _error(base: Mapping[int, ContextScore], other: Mapping[int, ContextScore], scales: Mapping[str, float]) -> float:
    """The standard error of a candidate's fitness, by how its own gain varies over questions and contexts."""
    common = sorted(base.keys() & other.keys())
    found = components([base[i] for i in common], [other[i] for i in common], scales)
    if found is None:
        return math.nan
    return found.standard_error(len(common), min(len(base[i].probes) for i in common))


def task_weights(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the weight of each task of a study's configuration, which may be any JSON; empty if there is one task."""
    parts = section(section(config, "task"), "parts")
    weights = {name: number(section(parts, name).get("weight"), 1.0) for name in parts}
    return {name: weight if weight > 0.0 else 1.0 for name, weight in weights.items()}


def _costs(evaluations: Mapping[Job, Evaluation], ascent: Sequence[AscentStep]) -> tuple[Cost, ...]:
    phases: dict[str, list[Evaluation]] = {}
    for job, score in evaluations.items():
        which = f"search, {'further contexts' if job.index else 'first context'}"
        phases.setdefault(which if job.split == "search" else job.split, []).append(score)
    known = ("search, first context", "search, further contexts", "validation", "test", "guard")
    order = [*(phase for phase in known if phase in phases), *sorted(phases.keys() - {*known})]
    tokens, seconds = sum(step.tokens for step in ascent), math.fsum(step.seconds for step in ascent)
    steps = (Cost(f"gradients, {len(ascent)} steps", 0, tokens, seconds),) if ascent else ()
    return steps + tuple(
        Cost(phase, len(scores), sum(s.n_tokens for s in scores), math.fsum(s.seconds for s in scores))
        for phase, scores in ((phase, phases[phase]) for phase in order)
    )


def section(value: Any, name: str) -> dict[str, Any]:
    """Return an object of a file that may hold anything; empty if it is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def number(value: Any, default: float) -> float:
    """Return a finite number of a file that may hold anything."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else default
