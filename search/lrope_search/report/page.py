"""The report of a study: one HTML page that needs no network, and its pictures as PNG beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lrope_gguf.files import atomic_write_bytes, atomic_write_text
from lrope_gguf.plot import require_matplotlib
from lrope_gguf.text import printable

from ..results.comparison import Interval, contexts_needed
from ..results.table import Cell, DepthTable
from .pictures import Picture, draw_pictures, drawn
from .summary import Cost, StudySummary, summarise

NAME = "report.html"
_LONG = 300
_MOST_ROWS = 200
_MOST_LAYERS = 512
_TOP = 10
# the page may load nothing, whatever a study's names contain
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(study_dir: Path, output: Path | None = None) -> Path:
    """Write the report of the study in ``study_dir`` and return the page's path.

    The same study gives the same bytes. The study is only read, and may be unfinished or in use.

    Args:
        study_dir: directory of a search.
        output: the page; ``report.html`` in the study's directory by default. Its pictures are written beside it,
            as ``report-factors.png`` and so on.

    Raises:
        PlotUnavailableError: matplotlib is missing.
        LropeError: there is no study, a file of it is damaged, or the report cannot be written.
    """
    page = Path(study_dir) / NAME if output is None else Path(output)
    require_matplotlib(page)
    study = summarise(Path(study_dir))
    pictures = draw_pictures(study)
    for name, picture in pictures.items():
        atomic_write_bytes(picture_path(page, name), picture.png)
    atomic_write_text(page, page_text(study, pictures))
    return page


def picture_path(page: Path, name: str) -> Path:
    """Where the picture ``name`` of the report ``page`` is."""
    return page.with_name(f"{page.stem}-{name}.png")


def page_text(study: StudySummary, pictures: dict[str, Picture]) -> str:
    """Return the page."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    name = model_name(study)
    figures = {key: _figure(pictures[key], title, text) for key, title, text in _captions(study) if key in pictures}
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Layer factors of {_html(name)}</title>",
        f"<style>\n{css}</style></head>",
        f"<body><main><header><h1>Layer factors of {_html(name)}</h1>",
        f'<p class="about">{_html(about(study))}</p></header>',
        *_verdict(study),
        *_grid(figures[name] for name in ("factors", "accuracy") if name in figures),
        *_depth_section(study),
        *_grid(figures[name] for name in ("fitness", "population") if name in figures),
        *_grid([*(figures[name] for name in ("cost",) if name in figures), *_cost_section(study)]),
        *_details(study),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


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
        words.append(_count(len(study.factors), "layer"))
    versions = study.config.get("versions")
    if isinstance(versions, dict):
        words += [f"{name} {_value(version)}" for name, version in versions.items()]
    return printable(", ".join(words), _LONG)


def cost_words(cost: Cost) -> str:
    """Evaluations, tokens, time and rate in words."""
    text = f"{_count(cost.evaluations, 'evaluation')}, {cost.tokens:,} tokens"
    return text if math.isnan(cost.rate) else f"{text}, {duration(cost.seconds)}, {cost.rate:,.0f} tokens/s"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits."""
    if seconds >= 7200.0:
        return f"{seconds / 3600.0:.1f} hours"
    return f"{seconds / 60.0:.1f} minutes" if seconds >= 120.0 else f"{seconds:.1f} seconds"


def _verdict(study: StudySummary) -> Iterator[str]:
    state, title = ("open", "Not finished") if not study.finished else (
        ("good", "Recommended") if study.recommended else ("bad", "Not recommended")
    )  # fmt: skip
    yield f'<section class="card verdict {state}"><h2>{title}</h2>'
    yield f"<p>{_html(_sentence(study.verdict))}</p>"
    facts = list(_facts(study))
    if facts:
        yield '<dl class="facts">'
        for name, value, details in facts:
            small = "".join(f"<small>{_html(line)}</small>" for line in details)
            yield f"<div><dt>{_html(name)}</dt><dd>{_html(value)}{small}</dd></div>"
        yield "</dl>"
    yield '<div class="next">'
    if study.recommended:
        yield "<p>Next, store the factors in the model, which any llama.cpp with the patch then uses:</p>"
        yield "<pre><code>lrope-gguf write MODEL --curve best.json</code></pre>"
        yield '<p class="note"><code>best.json</code> is in the study\'s directory; <code>MODEL</code> is the GGUF '
        yield "file that was searched. <code>lrope-gguf remove MODEL</code> takes the factors out again.</p>"
    elif study.finished:
        yield "<p>Next, leave the model as it is. To look further, run the same <code>lrope-gguf search</code> command "
        yield "with a larger <code>--max-evaluations</code> (the study continues), or a new study with more contexts."
        yield "</p>"
    else:
        yield "<p>Next, run the same <code>lrope-gguf search</code> command again: nothing that was measured is lost. "
        yield "What follows is not evidence of a gain yet.</p>"
    yield "</div></section>"


def _facts(study: StudySummary) -> Iterator[tuple[str, str, list[str]]]:
    """Name, value and details of what one wants to know first."""
    table = study.table
    if table is not None and study.table_split == "test":
        base = table.totals["base"].accuracy
        for name, comparison in reversed(table.comparisons.items()):
            interval = _interval(comparison.accuracy_gain, table, study) or "too few contexts for an interval"
            yield (
                "Gain in accuracy" if name == "curve" else f"Best {name}",
                f"{100 * comparison.accuracy_gain.mean:+.1f} points",
                [interval, f"{100 * base:.1f} % to {100 * comparison.accuracy:.1f} %"],
            )
        yield "Unseen contexts", str(table.n_contexts), [f"{table.n_probes} questions"]
    if study.guard:
        worst = max(study.guard, key=lambda length: study.guard[length])
        lengths = ", ".join(f"{length} {value:.2g}" for length, value in study.guard.items())
        yield "KL on ordinary text", f"{study.guard[worst]:.2g}", ["nats per token from the base model", lengths]
    if study.trials:
        dropped = sum(trial.contexts < study.search_contexts for trial in study.trials)
        yield "Candidates", str(len(study.trials)), [f"{dropped} dropped early"]
    total = study.total
    if total.evaluations:
        measured = not math.isnan(total.rate)
        yield (
            "Cost",
            duration(total.seconds) if measured else f"{total.tokens:,} tokens",
            [f"{total.tokens:,} tokens", f"{total.rate:,.0f} tokens/s"] if measured else [],
        )


def _captions(study: StudySummary) -> Iterator[tuple[str, str, str]]:
    """Name, title and text of every picture; the text says in words what the picture shows."""
    if study.factors is not None:
        low, high = min(study.factors), max(study.factors)
        place = f"lowest {low:.4g} in layer {study.factors.index(low)}, highest {high:.4g} in layer "
        text = f"Factors of the best curve: {place}{study.factors.index(high)}; 1 (dashed) changes nothing."
        if low == high == 1.0:
            text = "The base model is the best so far: all factors are 1."
        yield "factors", "Factors over the layers", text
    table = study.table
    if table is not None:
        ends = ", ".join(
            f"{name}: {100 * min(c.accuracy for c in cells):.0f} to {100 * max(c.accuracy for c in cells):.0f} %"
            for name, cells in table.cells.items()
        )
        told = table.n_contexts >= contexts_needed(study.confidence)
        where = (
            f"{_count(table.n_contexts, 'test context')} that neither search nor validation saw"
            if study.table_split == "test"
            else f"{_count(table.n_contexts, 'search context')}, on which candidates were chosen: no evidence"
        )
        yield (
            "accuracy",
            "Accuracy by depth",
            f"On {where}; over the depths, {ends}. Above: Wilson intervals of each accuracy. Below: gain over the base "
            f"model, {'with paired bootstrap intervals over contexts' if told else 'too few contexts for intervals'} "
            f"({100 * study.confidence:g} % both).",
        )
    if study.trials:
        n, whole = len(study.trials), [t for t in study.trials if t.contexts >= study.search_contexts]
        best = max((t.fitness for t in whole), default=-math.inf)
        reached = f"the best reached {best:+.4f}" if math.isfinite(best) else "none with a finite score"
        yield (
            "fitness",
            "Fitness over evaluations",
            f"{_count(n, 'candidate')}; {len(whole)} saw all {_count(study.search_contexts, 'search context')}, "
            f"{reached}. Fitness is the gain in the answers' log-probability over the base model; of a candidate "
            "dropped early it is that on the contexts it saw.",
        )
        shown = len(drawn(study.trials))
        yield (
            "population",
            "The population over time",
            f"{'Every candidate' if shown == n else f'{shown} of {n} candidates, evenly chosen'}, coloured by when "
            "it was tried, and the best curve.",
        )
    if study.costs:
        text = f"{cost_words(study.total)} of work, summed over workers."
        planned = len(study.trials) * study.search_contexts
        saved = 1.0 - sum(t.contexts for t in study.trials) / planned if planned else 0.0
        if saved > 0.0:
            text += f" Dropping candidates early saved {saved:.0%} of the search's evaluations."
        yield "cost", "Cost", text


def _grid(cards: Iterable[str]) -> Iterator[str]:
    if text := "\n".join(cards):
        yield f'<div class="figures">{text}</div>'


def _figure(picture: Picture, title: str, text: str) -> str:
    name = picture.name
    svg = picture.svg.replace(
        "<svg ", f'<svg role="img" aria-labelledby="{name}-title" aria-describedby="{name}-text" ', 1
    )
    return (
        f'<figure class="card" id="{name}"><h2 id="{name}-title">{_html(title)}</h2>\n{svg}\n'
        f'<figcaption id="{name}-text">{_html(text)}</figcaption></figure>'
    )


def _depth_section(study: StudySummary) -> Iterator[str]:
    table = study.table
    if table is None:
        return
    heads = [
        "depth",
        *(head for name in table.cells for head in ((name,) if name == "base" else (name, "gain, points"))),
    ]
    what = (
        "test contexts"
        if study.table_split == "test"
        else "search contexts, on which candidates were chosen: no evidence"
    )
    yield '<section class="card"><h2>Accuracy by depth, in numbers</h2><div class="scroll" tabindex="0"><table>'
    yield f"<caption>Per cent of answers that are exactly right, on {table.n_contexts} {what}. Gain over the base "
    yield f"model, with its {100 * study.confidence:g} % interval over contexts.</caption>"
    yield "<thead><tr>" + "".join(f'<th scope="col">{_html(head)}</th>' for head in heads) + "</tr></thead><tbody>"
    for i, depth in enumerate(table.depths):
        gains = {name: comparison.by_depth[i].accuracy_gain for name, comparison in table.comparisons.items()}
        yield _row(f"{depth:.2f}", {name: cells[i] for name, cells in table.cells.items()}, gains, table, study)
    gains = {name: comparison.accuracy_gain for name, comparison in table.comparisons.items()}
    yield _row("all", table.totals, gains, table, study)
    yield "</tbody></table></div></section>"


def _row(label: str, cells: dict[str, Cell], gains: dict[str, Interval], table: DepthTable, study: StudySummary) -> str:
    text = f'<th scope="row">{label}</th>'
    for name, cell in cells.items():
        text += f"<td>{100 * cell.accuracy:.1f}</td>"
        if name in gains:
            kind = "" if name == "curve" else " class=uniform"
            interval = _interval(gains[name], table, study)
            text += f"<td{kind}>{100 * gains[name].mean:+.1f} <small>{interval}</small></td>"
    return f"<tr{' class=sum' if label == 'all' else ''}>{text}</tr>"


def _interval(gain: Interval, table: DepthTable, study: StudySummary) -> str:
    if table.n_contexts < contexts_needed(study.confidence) or not math.isfinite(gain.low):
        return ""
    return f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def _cost_section(study: StudySummary) -> Iterator[str]:
    if not study.costs:
        return
    yield '<section class="card"><h2>Cost, in numbers</h2><div class="scroll" tabindex="0"><table>'
    yield "<caption>An evaluation is one context under one candidate. Seconds are of work, summed over workers."
    yield "</caption>"
    heads = ("phase", "evaluations", "tokens", "seconds", "tokens/s")
    yield "<thead><tr>" + "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr></thead><tbody>"
    for cost in (*study.costs, study.total):
        rate = "–" if math.isnan(cost.rate) else f"{cost.rate:,.0f}"
        yield (
            f'<tr{" class=sum" if cost.phase == "in all" else ""}><th scope="row">{_html(cost.phase)}</th>'
            f"<td>{cost.evaluations:,}</td><td>{cost.tokens:,}</td><td>{cost.seconds:,.1f}</td><td>{rate}</td></tr>"
        )
    yield "</tbody></table></div></section>"


def _details(study: StudySummary) -> Iterator[str]:
    yield '<section class="card"><h2>Details</h2>'
    ranked = sorted(study.trials, key=lambda trial: (-trial.contexts, -trial.fitness, trial.number))[:_TOP]
    if ranked:
        yield f"<details><summary>Best {_count(len(ranked), 'candidate')}</summary>"
        yield '<div class="scroll" tabindex="0"><table>'
        yield "<caption>By search alone, before validation.</caption><thead><tr>"
        heads = ("candidate", "origin", "contexts", "fitness", "factors")
        yield "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr></thead><tbody>"
        for trial in ranked:
            fitness = f"{trial.fitness:+.4f}" if math.isfinite(trial.fitness) else "not finite"
            yield (
                f'<tr><th scope="row">{trial.number}</th><td>{_html(printable(trial.origin, 60) or "–")}</td>'
                f"<td>{trial.contexts}</td><td>{fitness}</td>"
                f"<td>{min(trial.factors):.4g} to {max(trial.factors):.4g}</td></tr>"
            )
        yield "</tbody></table></div></details>"
    if study.factors is not None:
        yield '<details><summary>Factor of every layer</summary><ol class="layers" start="0">'
        yield from (f"<li><span>{i}</span> {s:.5g}</li>" for i, s in enumerate(study.factors[:_MOST_LAYERS]))
        yield "</ol>"
        if len(study.factors) > _MOST_LAYERS:
            yield f'<p class="note">and {len(study.factors) - _MOST_LAYERS} more, see best.json</p>'
        yield "</details>"
    rows = list(flat(study.config))
    yield "<details open><summary>Settings of the study</summary>"
    yield '<div class="scroll" tabindex="0"><table><caption>From config.json; with these the search can be made again.'
    yield '</caption><thead><tr><th scope="col">setting</th><th scope="col" class="text">value</th></tr></thead><tbody>'
    for key, value in rows[:_MOST_ROWS]:
        yield f'<tr><th scope="row">{_html(printable(key, 120))}</th><td class="text">{_html(value)}</td></tr>'
    yield "</tbody></table></div>"
    if len(rows) > _MOST_ROWS:
        yield f'<p class="note">and {len(rows) - _MOST_ROWS} more, see config.json</p>'
    yield "</details></section>"


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield rows of nested JSON: dotted key, and value in words."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, _value(value)


def _value(value: Any) -> str:
    if isinstance(value, list):
        text = ", ".join(map(_value, value[:_LONG]))
    elif value is None or isinstance(value, bool):
        text = "" if value is None else "yes" if value else "no"
    else:
        text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return printable(text or "–", _LONG)


def _sentence(text: str) -> str:
    text = printable(text, 4 * _LONG).strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _html(text: str) -> str:
    return escape(text.encode("utf-8", "replace").decode())


def summary_lines(study: StudySummary) -> Sequence[str]:
    """The report as text for a terminal."""
    from lrope_gguf.text import sparkline

    lines = [f"model       {model_name(study)}", f"study       {about(study)}"]
    if study.factors is not None:
        low, high = min(study.factors), max(study.factors)
        lines.append(f"factors     {sparkline(study.factors)} from {low:.4g} to {high:.4g}")
    if study.best is not None and study.best.control_points is not None:
        points = ", ".join(f"({x:.3g}, {y:.4g})" for x, y in study.best.control_points)
        lines.append(f"curve       control points {points}")
    for split in ("search", "validation"):
        result = study.results.get(split)
        if isinstance(result, dict) and isinstance(result.get("fitness"), (int, float)):
            lines.append(f"{split:<11} {result['fitness']:+.4f} nats a token on {result.get('contexts')} contexts")
    lines += [f"{f'KL, {name}':<11} {value:.4g} nats a token on ordinary text" for name, value in study.guard.items()]
    if study.costs:
        lines.append(f"cost        {cost_words(study.total)}")
    if study.table is not None:
        lines += ["", str(study.table)]
        if study.table_split != "test":
            lines += ["(on the search contexts, which candidates were chosen on: no evidence of a gain)"]
    return [*lines, "", printable(study.verdict)]
