"""A study's summary in words, for a terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lrope_gguf.curve import Rows
from lrope_gguf.text import printable, sparkline

from ..results.summary import Cost, StudySummary
from ..results.table import left_aligned

_EFFECTS = 6  # of the layer scan, on each side

LONG = 300
"""Characters that a name or a value may take."""


def summary_lines(study: StudySummary) -> Sequence[str]:
    """The report as text for a terminal."""
    lines = [f"model       {model_name(study)}", f"study       {about(study)}"]
    if study.factors is not None and shows_layers(study):
        low, high = min(study.factors), max(study.factors)
        lines.append(f"factors     {sparkline(study.factors)} from {low:.4g} to {high:.4g}")
    lines += [f"{'heads':<11} {rows_words(name, rows)}" for name, rows in study.rows.items()]
    if study.best is not None and study.best.control_points is not None:
        points = ", ".join(f"({x:.3g}, {y:.4g})" for x, y in study.best.control_points)
        lines.append(f"curve       control points {points}")
    stages = {"search": study.searched, "validation": None if study.findings is None else study.findings.validation}
    lines += [
        f"{name:<11} {stage.fitness:+.4f} {study.unit} on {stage.contexts} contexts"
        for name, stage in stages.items()
        if stage is not None
    ]
    lines += [f"{f'KL, {name}':<11} {value:.4g} nats a token on ordinary text" for name, value in study.guard.items()]
    if study.ascent:
        lines.append(f"gradients   {ascent_words(study)}")
    if study.scan:
        lines.append(f"layer scan  {scan_words(study)}")
    if study.costs:
        lines.append(f"cost        {cost_words(study.total)}")
    if shows_front(study):
        head = f"gain on validation contexts against KL on ordinary text, nats a token; {limit_words(study)}"
        lines += ["", head, *left_aligned(front_rows(study))]
    if study.table is not None:
        lines += ["", str(study.table)]
        if study.table_split != "test":
            lines += ["(on the search contexts, on which candidates were chosen: no evidence of a gain)"]
    return [*lines, "", printable(study.verdict)]


def shows_layers(study: StudySummary) -> bool:
    """Whether factors of layers say anything: not where heads alone have some."""
    return not study.rows or set(study.factors or ()) != {1.0}


def rows_words(name: str, rows: Rows) -> str:
    """What heads have of their own in words."""
    values = [value for row in rows for value in row]
    of_heads = {"head_factors": "factors of KV heads", "query_scales": "query scales of heads"}[name]
    changed = sum(value != 1.0 for value in values)
    return f"{len(values)} {of_heads} from {min(values):.4g} to {max(values):.4g}; {changed} differ from 1"


def ascent_words(study: StudySummary) -> str:
    """The steps that followed derivatives in words: where the first and the last began."""
    first, last = study.ascent[0], study.ascent[-1]
    each = ", ".join(f"{name} from {first.gains.get(name, math.nan):.3f} to {g:.3f}" for name, g in last.gains.items())
    return (
        f"{count(len(study.ascent), 'step')}, log-probability of {each}, on contexts of their own; "
        f"KL {last.divergence:.3g} at the last"
    )


def scan_words(study: StudySummary) -> str:
    """The layer scan in words: what gained and what lost beyond noise, and the rest."""
    beyond = sorted((e for e in study.scan if e.beyond_noise), key=lambda effect: -effect.fitness)
    words = [f"{count(len(study.scan), 'candidate')} with one layer, or one group of a deep model, at another factor"]
    gains, losses = [e for e in beyond if e.fitness > 0.0], [e for e in reversed(beyond) if e.fitness < 0.0]
    for name, side in (("gain", gains), ("loss", losses)):
        shown = ", ".join(f"{_layers(e.layers)} at {e.factor:.3g} ({e.fitness:+.4f})" for e in side[:_EFFECTS])
        more = f" and {len(side) - _EFFECTS} more" if len(side) > _EFFECTS else ""
        words.append(f"{name} beyond two standard errors: {shown + more if side else 'none'}")
    return "; ".join(words) + "."


def _layers(layers: tuple[int, ...]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def shows_front(study: StudySummary) -> bool:
    """Whether there are candidates to compare by gain and KL."""
    return len(study.front.points) > 1


def front_rows(study: StudySummary) -> list[list[str]]:
    """Gain against KL on ordinary text, with a head: a row for each candidate of which both are known, by KL."""
    front, trials = study.front, {trial.factors: trial for trial in study.trials}
    rows = [["candidate", "origin", f"gain, {study.unit}", "KL, short", "KL, long", ""]]
    for point in front.points:
        trial = trials.get(point.factors)
        chosen = study.finished and point.factors == study.factors
        notes = {"chosen": chosen, "front": point in front.best, "over --max-kl": not point.kl <= front.limit}
        known = ["", ""] if trial is None else [str(trial.number), printable(trial.origin, 30)]
        numbers = [f"{point.gain:+.4f}", f"{point.short:.4f}", f"{point.long:.4f}"]
        rows.append([*known, *numbers, ", ".join(note for note, holds in notes.items() if holds)])
    return rows


def limit_words(study: StudySummary) -> str:
    """The limit of KL in words."""
    limit = study.front.limit
    return f"--max-kl {limit:g}" if math.isfinite(limit) else "no --max-kl known"


def model_name(study: StudySummary) -> str:
    """What the searched model is called."""
    model = study.config.get("model")
    name = (model.get("name") or model.get("architecture")) if isinstance(model, dict) else model
    return printable(name if isinstance(name, str) and name.strip() else "a model", 120)


def about(study: StudySummary) -> str:
    """The study in one line: task, architecture, layers, versions."""
    task = study.config.get("task")
    words = [f"task {_value(task.get('task', task.get('name', 'not named')) if isinstance(task, dict) else task)}"]
    if study.best is not None and study.best.architecture:
        words.append(f"architecture {study.best.architecture}")
    if study.factors is not None:
        words.append(count(len(study.factors), "layer"))
    versions = study.config.get("versions")
    if isinstance(versions, dict):
        words += [f"{name} {_value(version)}" for name, version in versions.items()]
    return printable(", ".join(words), LONG)


def cost_words(cost: Cost) -> str:
    """Evaluations, tokens, time and rate in words."""
    text = f"{count(cost.evaluations, 'evaluation')}, {cost.tokens:,} tokens"
    return text if math.isnan(cost.rate) else f"{text}, {duration(cost.seconds)}, {cost.rate:,.0f} tokens/s"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that suits so many seconds, and its seconds."""
    return ("hours", 3600.0) if seconds >= 7200.0 else ("minutes", 60.0) if seconds >= 120.0 else ("seconds", 1.0)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits."""
    name, unit = time_unit(seconds)
    return f"{seconds / unit:.1f} {name}"


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield rows of nested JSON: dotted key, and value in words."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, _value(value)


def _value(value: Any) -> str:
    if isinstance(value, list):
        text = ", ".join(map(_value, value[:LONG]))
    elif value is None or isinstance(value, bool):
        text = "" if value is None else "yes" if value else "no"
    else:
        text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return printable(text or "–", LONG)


def count(n: int, what: str) -> str:
    """A number of things in words."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
