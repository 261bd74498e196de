"""A study read from its files, without changing them and while a search may be writing to them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrope_gguf.curve import CurveFile
from lrope_gguf.errors import LropeError

from ..results import summary as summaries
from ..results.findings import Findings, Stage, Uniform
from ..results.front import Front
from ..results.objective import Objective
from ..results.summary import Scores, StudySummary, Trial, intended_confidence, number, of_split, section
from ..results.table import depth_table
from ..scores import ContextScore, DivergenceScore, Evaluation, Factors, Job
from ..study.ascend import Trail
from ..study.store import Study, holds_search, parse_evaluations


def read_study(directory: Path) -> StudySummary:
    """Read the study in ``directory``, and summarise it: findings by ``best.json``, the rest by the evaluations.

    Of a study that is older than looks, the findings are made good: with the factors that the best uniform one was
    measured with, and with today's intervals. Raises `LropeError`: there is none, or a file of it is damaged; the
    message says which, and what to do.
    """
    config = _config(directory)
    path = directory / "best.json"
    best = CurveFile.load(path) if path.exists() else None
    evaluations = _evaluations(directory)
    depths: dict[tuple[str, int], list[float] | None] = {}
    n_layer = next((len(job.factors) for job in evaluations), None if best is None else best.block_count)
    for job, score in evaluations.items():
        asked = [probe.depth for probe in score.probes] if isinstance(score, ContextScore) else None
        if len(job.factors) != n_layer or depths.setdefault((job.split, job.index), asked) != asked:
            raise LropeError(
                f"{directory / 'evaluations.jsonl'}: its lines differ in layers or probes, as if two searches had "
                "written the file; search again in another directory"
            )
    trials, scales = _trials(directory, n_layer), _scales(directory)
    if best is not None and n_layer is not None:
        best = _with_factors(directory, best, n_layer)
    settings, weights = section(config, "search"), summaries.task_weights(config)
    searched, tested = of_split(evaluations, "search"), of_split(evaluations, "test")
    base: Factors = (1.0,) * next((len(job.factors) for job in evaluations), 0)
    how = number(settings.get("middle_weight"), 0.0), weights, scales
    if trials is None:
        trials = _trials_from(searched, base, Objective(tuple(searched.get(base, {}).values()), *how))
    results = {} if best is None else section(best.provenance, "results")
    factors = None if best is None else best.layer_factors
    findings = None if factors is None else Findings.from_json(results, factors, intended_confidence(config))
    if findings is not None and findings.uniform is not None and not findings.uniform.factors:
        findings = replace(findings, uniform=_uniform(findings.uniform, tested, trials))
    table, sides = None, _of_sides(findings, factors, base, searched if findings is None else tested)
    if sides:
        table = depth_table(
            sides,
            seed=max(int(number(settings.get("seed"), 0)), 0),
            confidence=intended_confidence(config) if findings is None else findings.look.confidence,
            weights=weights,
            over=findings is not None and findings.over_uniform is not None,
        )
        if findings is not None and "look" not in results:
            findings = findings.measured(table)
    validated = of_split(evaluations, "validation")
    of_base = validated.get(base, {})
    divergences: dict[Factors, list[DivergenceScore]] = {}
    for job, score in evaluations.items():
        if isinstance(score, DivergenceScore):
            divergences.setdefault(job.factors, []).append(score)
    whole = {
        factors: list(scores.values())
        for factors, scores in validated.items()
        if factors != base and factors in divergences and scores.keys() == of_base.keys()
    }
    gains = Objective(tuple(of_base.values()), *how).of_all(whole)
    front = Front.of_scores(gains, divergences, number(settings.get("max_kl"), math.inf))
    stage, ascent = _searched(best) if findings is None else findings.search, Trail.of(directory).points()
    return summaries.summarise(
        directory, config, best, evaluations, trials, scales, findings, stage, table, front, ascent
    )


def _of_sides(
    findings: Findings | None, factors: Factors | None, base: Factors, scores: Scores
) -> dict[str, list[ContextScore]]:
    """The sides on the contexts that all of them saw, of the test on those of its look; empty without a base."""
    sides = {"base": base}
    if findings is not None and findings.uniform is not None:
        sides[findings.uniform.name] = findings.uniform.factors
    if factors is not None and factors != base:
        sides["curve"] = factors
    seen = {name: scores[side] for name, side in sides.items() if side in scores}
    common = sorted(set.intersection(*map(set, seen.values()))) if "base" in seen else []
    if findings is not None:
        common = [index for index in common if index in findings.look.contexts]
    return {name: [of[index] for index in common] for name, of in seen.items()} if common else {}


def _uniform(uniform: Uniform, tested: Scores, trials: Sequence[Trial]) -> Uniform:
    """Return the factors that were measured with it: it may move some layers alone, which older records do not say."""
    origins = {trial.factors: trial.origin for trial in trials}
    alike = [factors for factors in tested if set(factors) - {1.0} == {uniform.factor}]
    found = next((factors for factors in alike if origins.get(factors) == "uniform"), next(iter(alike), ()))
    return replace(uniform, factors=found)


def _searched(best: CurveFile | None) -> Stage | None:
    """What the best so far is worth, of a file that may hold anything."""
    try:
        return None if best is None else Stage.from_json(section(best.provenance, "results")["search"])
    except (KeyError, TypeError, ValueError):
        return None


def _trials_from(searched: Scores, base: Factors, objective: Objective) -> tuple[Trial, ...]:
    """The trials that the evaluations tell of, by first appearance: without origin and control points."""
    trials = []
    for order, (factors, scores) in enumerate(searched.items()):
        seen = [score for index, score in scores.items() if index in searched.get(base, {})]
        if seen:
            fitness = 0.0 if factors == base else objective.fitness(seen)
            trials.append(Trial(order, "", factors, None, len(seen), fitness))
    return tuple(trials)


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
    if not holds_search(config):
        raise LropeError(
            f"{directory}: holds measurements of eval --study and no search; run the same eval command to see its table"
        )
    return config


def _scales(directory: Path) -> dict[str, float]:
    """The scales of several tasks; empty where there are none: one task, or an older study."""
    kept = Study.kept(directory, "objective")
    scales = kept.get("scales") if isinstance(kept, dict) else None
    if not isinstance(scales, dict) or not all(isinstance(s, float) and 0.0 < s < math.inf for s in scales.values()):
        return {}
    return scales


def _with_factors(directory: Path, best: CurveFile, n_layer: int) -> CurveFile:
    """The document with its factors listed, which searches once did not: they rounded the curve's like this."""
    if best.control_points is None and best.layer_factors is None:
        return best  # numbers of heads alone
    try:
        factors = best.factors_for(n_layer)
    except LropeError as error:
        raise LropeError(f"{directory / 'best.json'}: {error}; check that it belongs to this study") from None
    listed = best.layer_factors is not None and len(best.layer_factors) == n_layer
    return best if listed else replace(best, layer_factors=tuple(round(s, 9) for s in factors))


def _evaluations(directory: Path) -> dict[Job, Evaluation]:
    path = directory / "evaluations.jsonl"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if (directory / "best.json").exists():
            raise LropeError(f"{path}: is missing, and the report needs it; search again") from None
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
    for place, line in enumerate(lines, start=1):
        try:
            trials.append(_trial(json.loads(line), n_layer))
        except (ValueError, TypeError, KeyError, RecursionError):
            if place < len(lines) or line.endswith(b"\n"):
                raise LropeError(
                    f"{path}: line {place} is damaged; delete the file, which the report can do without"
                ) from None
    return tuple(sorted(trials, key=lambda trial: trial.number))


def _trial(record: dict[str, Any], n_layer: int | None) -> Trial:
    factors = tuple(float(s) for s in record["factors"])
    points = record.get("control_points")
    if len(factors) != (n_layer or len(factors)) or not all(math.isfinite(s) for s in factors):
        raise ValueError("factors")
    curve = None if points is None else tuple((float(x), float(y)) for x, y in points)
    contexts, fitness = int(record["contexts"]), math.nan if record["fitness"] is None else float(record["fitness"])
    return Trial(int(record["id"]), str(record.get("origin", "")), factors, curve, contexts, fitness)
