"""The one summary of a study, from the scores in memory or read back: what it tried, found and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrope_gguf.curve import CurveFile, Point

from ..scores import LAYER_SCAN, ContextScore, DivergenceScore, Evaluation, Factors, Job
from .front import Front, FrontPoint
from .guard import divergences_by_length
from .intervals import finite
from .objective import Objective
from .table import DepthTable, depth_table
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
        """Call a fitness that is no finite number the worst."""
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
class StudySummary:
    """A study, finished or not: what text, JSON, page and MLflow show.

    Attributes:
        config: what the search was begun with.
        results: of ``best.json``: verdict and more once the search has ended.
        best: the best curve so far; None before there was one.
        factors: its factors, one a layer.
        uniform: the best uniform factor; None if there is none.
        trials: all candidates with a score, in order of asking.
        search_contexts: how many a candidate sees that is not dropped early.
        table: accuracies by depth, on test contexts or, before there are such, on search contexts (``table_split``).
        scan: what single layers, or groups of them, do alone, in order of asking; empty where none was looked at.
        guard: divergence from the base model on ordinary text, in nats per token, by length of the text.
        front: gain against that divergence, of all candidates of which both are known.
        costs: by phase, those that took place.
    """

    directory: Path
    config: dict[str, Any]
    results: dict[str, Any]
    best: CurveFile | None
    factors: Factors | None
    uniform: float | None
    trials: tuple[Trial, ...]
    search_contexts: int
    confidence: float
    table: DepthTable | None
    table_split: str
    scan: tuple[LayerEffect, ...]
    guard: dict[str, float]
    front: Front
    costs: tuple[Cost, ...]

    @property
    def finished(self) -> bool:
        """Whether the search has ended with a verdict."""
        return isinstance(self.results.get("verdict"), str)

    @property
    def recommended(self) -> bool:
        """Whether the verdict recommends the curve."""
        return self.finished and self.results.get("recommended") is True

    @property
    def verdict(self) -> str:
        """The verdict; of an unfinished search, how far it is."""
        if self.finished:
            return str(self.results["verdict"])
        best = max((t.fitness for t in self.trials if t.contexts >= self.search_contexts), default=0.0)
        text = f"the search has not ended: {len(self.trials)} candidates so far"
        return f"{text}, the best {best:+.4f} nats a token; the same command resumes it" if best > 0.0 else (
            f"{text}, none better than the base model; the same command resumes it"
        )  # fmt: skip

    def json(self) -> dict[str, Any]:
        """Return the results of ``best.json`` and what the evaluations add; finite numbers only."""
        return self.results | {
            "finished": self.finished,
            "recommended": self.recommended,
            "verdict": self.verdict,
            "candidates": len(self.trials),
            "accuracy": None if self.table is None else {"split": self.table_split, **self.table.json()},
            "kl": self.guard,
            "front": self.front.json(),
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
        best, values = 0.0, []
        for trial in self.trials:
            if trial.contexts >= self.search_contexts:
                best = max(best, trial.fitness)
            values.append(best)
        return values


def summarise(
    directory: Path,
    config: dict[str, Any],
    best: CurveFile | None,
    evaluations: Mapping[Job, Evaluation],
    trials: Sequence[Trial] | None = None,
    table: DepthTable | None = None,
) -> StudySummary:
    """Summarise a study.

    Args:
        directory: where it is kept.
        config: what the search was begun with; may be any JSON object.
        best: the best curve so far with the factors that were evaluated, and in its provenance the results.
        evaluations: every result.
        trials: all candidates with a score; None: those that the evaluations tell of.
        table: the sides on the contexts of the test, if it is known already.
    """
    results = {} if best is None else _section(best.provenance, "results")
    splits: dict[str, dict[Factors, dict[int, ContextScore]]] = {}
    divergences: dict[Factors, list[DivergenceScore]] = {}
    for job, score in evaluations.items():
        if isinstance(score, DivergenceScore):
            divergences.setdefault(job.factors, []).append(score)
        else:
            splits.setdefault(job.split, {}).setdefault(job.factors, {})[job.index] = score
    n_layer = next((len(job.factors) for job in evaluations), 0)
    settings, weights = _section(config, "search"), task_weights(config)
    searched = splits.get("search", {})
    base: Factors = (1.0,) * n_layer
    if trials is None:
        trials = _trials_from(searched, base, _number(settings.get("middle_weight"), 0.0), weights)
    seen = max((len(scores) for scores in searched.values()), default=0)
    factors = None if best is None else best.layer_factors
    uniform = _number(_section(results, "best_uniform").get("factor"), math.nan)
    confidence = min(max(_number(settings.get("confidence"), 0.95), 0.01), 0.9999)
    sides = {"base": base}
    if math.isfinite(uniform):
        sides[f"uniform {uniform:g}"] = (uniform,) * n_layer
    if factors is not None and factors != base:
        sides["curve"] = factors
    table_split = "test" if isinstance(results.get("verdict"), str) else "search"
    if table is None:
        options = {"seed": max(int(_number(settings.get("seed"), 0)), 0), "confidence": confidence}
        table = _table(splits.get(table_split, {}), sides, options | {"weights": weights})
    return StudySummary(
        directory=directory,
        config=config,
        results=results,
        best=best,
        factors=factors,
        uniform=uniform if math.isfinite(uniform) else None,
        trials=tuple(trials),
        search_contexts=int(_number(settings.get("search_contexts"), seen)),
        confidence=confidence,
        table=table,
        table_split=table_split,
        scan=_scan(trials, searched, base),
        guard=divergences_by_length(divergences.get(factors or (), ())),
        front=_front(settings, weights, splits.get("validation", {}), divergences, base),
        costs=_costs(evaluations),
    )


def _scan(trials: Sequence[Trial], searched: Scores, base: Factors) -> tuple[LayerEffect, ...]:
    effects = []
    for trial in trials:
        moved = tuple(layer for layer, factor in enumerate(trial.factors) if factor != 1.0)
        if trial.origin == LAYER_SCAN and moved:
            error = _error(searched.get(base, {}), searched.get(trial.factors, {}))
            effects.append(LayerEffect(moved, trial.factors[moved[0]], trial.contexts, trial.fitness, error))
    return tuple(effects)


def _error(base: Mapping[int, ContextScore], other: Mapping[int, ContextScore]) -> float:
    """The standard error of a candidate's fitness, by how its own gain varies over questions and contexts."""
    common = sorted(base.keys() & other.keys())
    found = components([base[i] for i in common], [other[i] for i in common])
    if found is None:
        return math.nan
    return found.standard_error(len(common), min(len(base[i].probes) for i in common))


def task_weights(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the weight of each task of a study's configuration, which may be any JSON; empty if there is one task."""
    parts = _section(_section(config, "task"), "parts")
    weights = {name: _number(_section(parts, name).get("weight"), 1.0) for name in parts}
    return {name: weight if weight > 0.0 else 1.0 for name, weight in weights.items()}


def _trials_from(
    searched: Scores, base: Factors, middle_weight: float, weights: Mapping[str, float]
) -> tuple[Trial, ...]:
    """The trials that the evaluations tell of, by first appearance: without origin and control points."""
    objective = Objective(tuple(searched.get(base, {}).values()), middle_weight, weights)
    trials = []
    for number, (factors, scores) in enumerate(searched.items()):
        seen = [score for index, score in scores.items() if index in searched.get(base, {})]
        if seen:
            fitness = 0.0 if factors == base else objective.fitness(seen)
            trials.append(Trial(number, "", factors, None, len(seen), fitness))
    return tuple(trials)


def _front(
    settings: Mapping[str, Any],
    weights: Mapping[str, float],
    validated: Scores,
    divergences: Mapping[Factors, Sequence[DivergenceScore]],
    base: Factors,
) -> Front:
    """Gain on validation contexts against KL, of those candidates that saw both all that the base model saw."""
    of_base = validated.get(base, {})
    objective = Objective(tuple(of_base.values()), _number(settings.get("middle_weight"), 0.0), weights)
    points = [
        FrontPoint(factors, objective.fitness(list(scores.values())), **divergences_by_length(divergences[factors]))
        for factors, scores in validated.items()
        if factors != base and factors in divergences and scores.keys() == of_base.keys()
    ]
    return Front.of(points, _number(settings.get("max_kl"), math.inf))


def _table(scores: Scores, sides: Mapping[str, Factors], options: Mapping[str, Any]) -> DepthTable | None:
    """The sides on the contexts that all of them saw; None if there are none, or nothing to compare."""
    sides = {name: factors for name, factors in sides.items() if factors in scores}
    if "base" not in sides or not (common := sorted(set.intersection(*(set(scores[f]) for f in sides.values())))):
        return None
    chosen = {name: [scores[factors][i] for i in common] for name, factors in sides.items()}
    return depth_table(chosen, **options)


def _costs(evaluations: Mapping[Job, Evaluation]) -> tuple[Cost, ...]:
    phases: dict[str, list[Evaluation]] = {}
    for job, score in evaluations.items():
        phase = (
            job.split if job.split != "search" else f"search, {'further contexts' if job.index else 'first context'}"
        )
        phases.setdefault(phase, []).append(score)
    order = ("search, first context", "search, further contexts", "validation", "test", "guard")
    return tuple(
        Cost(phase, len(scores), sum(s.n_tokens for s in scores), math.fsum(s.seconds for s in scores))
        for phase, scores in sorted(phases.items(), key=lambda item: _place(order, item[0]))
    )


def _place(order: Sequence[str], name: str) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order)), name


def _section(value: Any, name: str) -> dict[str, Any]:
    section = value.get(name) if isinstance(value, dict) else None
    return section if isinstance(section, dict) else {}


def _number(value: Any, default: float) -> float:
    """A finite number from a file that may hold anything."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else default
