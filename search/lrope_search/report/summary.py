"""What a study holds, finished or not, read without changing it and while a search may be writing to it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrope_gguf.curve import CurveFile, Point
from lrope_gguf.errors import LropeError

from ..results.comparison import divergences_by_length
from ..results.objective import Objective
from ..results.table import DepthTable, depth_table
from ..scores import ContextScore, DivergenceScore, Evaluation, Factors, Job
from ..study.store import parse_evaluations

Scores = Mapping[Factors, Mapping[int, ContextScore]]
"""Of one split, by factors and context."""

_SAME = 6e-4
"""How far factors from a control polygon may lie from those that were evaluated; candidates are further apart."""


@dataclass(frozen=True)
class Trial:
    """A candidate and its score: ``contexts`` seen, and fitness in nats per answer token, ``-inf`` if not finite."""

    number: int
    origin: str
    factors: Factors
    control_points: tuple[Point, ...] | None
    contexts: int
    fitness: float


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


@dataclass(frozen=True)
class StudySummary:
    """A study as its files tell it.

    Attributes:
        config: what the search was begun with.
        results: of ``best.json``: verdict and more once the search has ended.
        best: the best curve so far; None before there was one.
        factors: its factors, one a layer.
        uniform: the best uniform factor; None if there is none.
        trials: all candidates with a score, in order of asking.
        search_contexts: how many a candidate sees that is not dropped early.
        table: accuracies by depth, on test contexts or, before there are such, on search contexts (``table_split``).
        guard: divergence from the base model on ordinary text, in nats per token, by length of the text.
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
    guard: dict[str, float]
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


def summarise(directory: Path) -> StudySummary:
    """Read the study in ``directory``.

    Raises:
        LropeError: there is none, or a file of it is damaged; the message says which, and what to do.
    """
    config = _config(directory)
    best, results = _best(directory)
    evaluations = _evaluations(directory)
    splits: dict[str, dict[Factors, dict[int, ContextScore]]] = {}
    divergences: dict[Factors, list[DivergenceScore]] = {}
    for job, score in evaluations.items():
        if isinstance(score, DivergenceScore):
            divergences.setdefault(job.factors, []).append(score)
        else:
            splits.setdefault(job.split, {}).setdefault(job.factors, {})[job.index] = score
    n_layer = next((len(job.factors) for job in evaluations), None if best is None else best.block_count)
    depths: dict[tuple[str, int], list[float] | None] = {}
    for job, score in evaluations.items():
        asked = [probe.depth for probe in score.probes] if isinstance(score, ContextScore) else None
        if len(job.factors) != n_layer or depths.setdefault((job.split, job.index), asked) != asked:
            raise LropeError(
                f"{directory / 'evaluations.jsonl'}: its lines differ in layers or probes, as if two searches had "
                "written it; search again in another directory"
            )

    settings = _section(config, "search")
    middle_weight = _number(settings.get("middle_weight"), 0.0)
    searched = splits.get("search", {})
    base: Factors = (1.0,) * (n_layer or 0)
    trials = _trials(directory, n_layer)
    if trials is None:
        trials = _trials_from(searched, base, middle_weight)
    search_contexts = int(
        _number(settings.get("search_contexts"), max((len(scores) for scores in searched.values()), default=0))
    )
    factors = None if best is None or n_layer is None else _evaluated(_best_factors(directory, best, n_layer), splits)
    uniform = _number(_section(results, "best_uniform").get("factor"), math.nan)
    confidence = min(max(_number(settings.get("confidence"), 0.95), 0.01), 0.9999)
    sides = {"base": base}
    if math.isfinite(uniform):
        sides[f"uniform {uniform:g}"] = (uniform,) * (n_layer or 0)
    if factors is not None and factors != base:
        sides["curve"] = factors
    table_split = "test" if isinstance(results.get("verdict"), str) else "search"
    return StudySummary(
        directory=directory,
        config=config,
        results=results,
        best=best,
        factors=factors,
        uniform=uniform if math.isfinite(uniform) else None,
        trials=trials,
        search_contexts=search_contexts,
        confidence=confidence,
        table=_table(splits.get(table_split, {}), sides, int(_number(settings.get("seed"), 0)), confidence),
        table_split=table_split,
        guard=divergences_by_length(divergences.get(factors or (), ())),
        costs=_costs(evaluations),
    )


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise LropeError(f"{directory}: no config.json there; give the directory of a search, such as best.study")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LropeError(f"{path}: is not JSON ({error}); search again in another directory") from None
    if not isinstance(config, dict):
        raise LropeError(f"{path}: is not a JSON object; search again in another directory")
    return config


def _best(directory: Path) -> tuple[CurveFile | None, dict[str, Any]]:
    path = directory / "best.json"
    if not path.exists():
        return None, {}
    best = CurveFile.load(path)
    return best, _section(best.provenance, "results")


def _best_factors(directory: Path, best: CurveFile, n_layer: int) -> Factors:
    try:
        return best.factors_for(n_layer)
    except LropeError as error:
        raise LropeError(f"{directory / 'best.json'}: {error}; is it this study's?") from None


def _evaluations(directory: Path) -> dict[Job, Evaluation]:
    path = directory / "evaluations.jsonl"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if (directory / "best.json").exists():
            raise LropeError(f"{path}: is missing, the report is made from it; search again") from None
        return {}
    results: dict[Job, Evaluation] = {}
    for job, score in parse_evaluations(data, path)[0]:
        results.setdefault(job, score)
    return results


def _trials(directory: Path, n_layer: int | None) -> tuple[Trial, ...] | None:
    """The trials in ``candidates.jsonl``, a torn last line left out; None if there is no such file."""
    path = directory / "candidates.jsonl"
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    trials = []
    for number, line in enumerate(lines, start=1):
        try:
            trials.append(_trial(json.loads(line), n_layer))
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines) or line.endswith(b"\n"):
                raise LropeError(
                    f"{path}: line {number} is damaged; delete the file, the report does without it"
                ) from None
    return tuple(sorted(trials, key=lambda trial: trial.number))


def _trial(record: dict[str, Any], n_layer: int | None) -> Trial:
    factors = tuple(float(s) for s in record["factors"])
    points = record.get("control_points")
    if len(factors) != (n_layer or len(factors)) or not all(math.isfinite(s) for s in factors):
        raise ValueError("factors")
    fitness = record["fitness"]
    return Trial(
        number=int(record["id"]),
        origin=str(record.get("origin", "")),
        factors=factors,
        control_points=None if points is None else tuple((float(x), float(y)) for x, y in points),
        contexts=int(record["contexts"]),
        fitness=_finite_or_worst(math.nan if fitness is None else float(fitness)),
    )


def _trials_from(searched: Scores, base: Factors, middle_weight: float) -> tuple[Trial, ...]:
    """The trials that the evaluations tell of, by first appearance: without origin and control points."""
    objective = Objective(tuple(searched.get(base, {}).values()), middle_weight)
    trials = []
    for number, (factors, scores) in enumerate(searched.items()):
        seen = [score for index, score in scores.items() if index in searched.get(base, {})]
        if seen:
            fitness = 0.0 if factors == base else objective.fitness(seen)
            trials.append(Trial(number, "", factors, None, len(seen), _finite_or_worst(fitness)))
    return tuple(trials)


def _evaluated(factors: Factors, splits: Mapping[str, Scores]) -> Factors:
    """The factors, as they were evaluated."""

    def distance(other: Factors) -> float:
        return max(abs(a - b) for a, b in zip(factors, other, strict=True))

    nearest = min((other for scores in splits.values() for other in scores), key=distance, default=factors)
    return nearest if distance(nearest) <= _SAME else factors


def _table(scores: Scores, sides: Mapping[str, Factors], seed: int, confidence: float) -> DepthTable | None:
    """The sides on the contexts that all of them saw; None if there are none, or nothing to compare."""
    sides = {name: factors for name, factors in sides.items() if factors in scores}
    if "base" not in sides or not (common := sorted(set.intersection(*(set(scores[f]) for f in sides.values())))):
        return None
    chosen = {name: [scores[factors][i] for i in common] for name, factors in sides.items()}
    return depth_table(chosen, seed=max(seed, 0), confidence=confidence)


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


def _finite_or_worst(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
