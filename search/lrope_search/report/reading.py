"""A study read from its files, without changing them and while a search may be writing to them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrope_gguf.curve import CurveFile
from lrope_gguf.errors import LropeError

from ..results.summary import StudySummary, Trial, recover
from ..scores import ContextScore, Evaluation, Job
from ..study.store import Study, holds_search, parse_evaluations


def read_study(directory: Path) -> StudySummary:
    """Read the study in ``directory``, and summarise it.

    Raises:
        LropeError: there is none, or a file of it is damaged; the message says which, and what to do.
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
                "written it; search again in another directory"
            )
    trials = _trials(directory, n_layer)
    if best is not None and n_layer is not None:
        best = _with_factors(directory, best, n_layer)
    return recover(directory, config, best, evaluations, trials, _scales(directory))


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
            f"{directory}: holds no search, but what eval --study measured; the same eval prints its table"
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
    try:
        factors = best.factors_for(n_layer)
    except LropeError as error:
        raise LropeError(f"{directory / 'best.json'}: {error}; is it this study's?") from None
    listed = best.layer_factors is not None and len(best.layer_factors) == n_layer
    return best if listed else replace(best, layer_factors=tuple(round(s, 9) for s in factors))


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
        fitness=math.nan if fitness is None else float(fitness),
    )
