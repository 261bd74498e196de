"""The report of a study: one HTML page that needs no network, and its pictures as PNG beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lrope_gguf.files import atomic_write_bytes, atomic_write_text
from lrope_gguf.plot import require_matplotlib
from lrope_gguf.text import printable

from ..results.comparison import Comparison
from ..results.intervals import Interval
from ..results.summary import StudySummary
from . import text as words
from .pictures import Picture, draw_pictures, drawn
from .text import LONG, about, cost_words, count, duration, flat, limit_words, shows_front, shows_layers

NAME = "report.html"
_MOST_ROWS = 200
_MOST_LAYERS = 512
_TOP = 10
_SCALED = " of each task's questions under the base model"


def write_report(study: StudySummary, output: Path | None = None) -> Path:
    """Write the report of a study, by default into its directory, and return the page's path.

    The same study, which may be unfinished or in use, gives the same bytes. Pictures are written beside the page, as
    ``report-factors.png`` and so on. Raises `LropeError`: matplotlib is missing, or a file cannot be written.
    """
    page = study.directory / NAME if output is None else Path(output)
    require_matplotlib(page)
    pictures = draw_pictures(study)
    for name, picture in pictures.items():
        atomic_write_bytes(page.with_name(f"{page.stem}-{name}.png"), picture.png)
    atomic_write_text(page, page_text(study, pictures))
    return page


def page_text(study: StudySummary, pictures: Mapping[str, Picture]) -> str:
    """Return the page: the template beside this module, which escapes whatever a study's names contain."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    verdict = printable(study.verdict, 4 * LONG).strip()
    environment.filters |= {"count": count, "printable": printable, "finite": math.isfinite}
    page = environment.get_template("page.html.j2").render(
        study=study,
        css=Markup((here / "report.css").read_text(encoding="utf-8")),
        name=words.model_name(study),
        about=about(study),
        verdict=f"{verdict[:1].upper()}{verdict[1:]}{'' if verdict.endswith('.') else '.'}",
        facts=list(_facts(study)),
        figures={key: (title, text, pictures[key]) for key, title, text in _captions(study) if key in pictures},
        interval=_interval,
        ranked=sorted(study.trials, key=lambda trial: (-trial.contexts, -trial.fitness, trial.number))[:_TOP],
        front=words.front_rows(study) if shows_front(study) else [],
        most_layers=_MOST_LAYERS,
        settings=list(flat(study.config)),
        most_settings=_MOST_ROWS,
    )
    return page.encode("utf-8", "replace").decode() + "\n"  # names may hold what UTF-8 cannot say


def _facts(study: StudySummary) -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, value and details of the key figures."""
    table = study.table
    if table is not None and study.table_split == "test":
        base = table.totals["base"].accuracy
        for name, comparison in reversed(table.comparisons.items()):
            interval = _interval(comparison.accuracy_gain, comparison) or "too few contexts for an interval"
            details = [interval, f"{100 * base:.1f} % to {100 * comparison.accuracy:.1f} %"]
            gained = f"{100 * comparison.accuracy_gain.mean:+.1f} points"
            yield "Gain in accuracy" if name == "curve" else f"Best {name}", gained, details
        for task, alone in table.tasks.items():
            if "curve" in alone.comparisons:
                gain = alone.comparisons["curve"].accuracy_gain
                details = [_interval(gain, alone.comparisons["curve"]), f"weight {table.weights[task]:g}"]
                yield f"Gain in {printable(task, 20)}", f"{100 * gain.mean:+.1f} points", list(filter(None, details))
        look = study.findings.look if study.findings is not None else None
        again = [f"look {look.number} of this study"] if look is not None and look.number > 1 else []
        name = "Unseen contexts" if look is None or look.new else "Contexts"
        yield name, str(table.n_contexts), [f"{table.n_probes} questions", *again]
    if study.guard:
        worst = max(study.guard, key=lambda length: study.guard[length])
        lengths = ", ".join(f"{length} {value:.2g}" for length, value in study.guard.items())
        yield "KL on ordinary text", f"{study.guard[worst]:.2g}", ["nats per token from the base model", lengths]
    if study.trials:
        dropped = sum(trial.contexts < study.search_contexts for trial in study.trials)
        yield "Candidates", str(len(study.trials)), [f"{dropped} dropped early"]
    total, tokens = study.total, f"{study.total.tokens:,} tokens"
    if total.evaluations and math.isnan(total.rate):
        yield "Cost", tokens, []
    elif total.evaluations:
        yield "Cost", duration(total.seconds), [tokens, f"{total.rate:,.0f} tokens/s"]


def _captions(study: StudySummary) -> Iterator[tuple[str, str, str]]:
    """Name, title and text of every picture; the text says in words what the picture shows."""
    if study.factors is not None:
        low, high = min(study.factors), max(study.factors)
        place = f"lowest {low:.4g} in layer {study.factors.index(low)}, highest {high:.4g} in layer "
        text = f"Factors of the best curve: {place}{study.factors.index(high)}; 1 (dashed) changes nothing."
        if study.rows:
            text = f"{'; '.join(words.rows_words(name, rows) for name, rows in study.rows.items())}. A dot is a head."
        elif low == high == 1.0:
            text = "The base model is the best so far: all factors are 1."
        yield "factors", "Factors over the layers", text
    table = study.table
    if table is not None:
        ends = ", ".join(
            f"{name}: {100 * min(c.accuracy for c in cells):.0f} to {100 * max(c.accuracy for c in cells):.0f} %"
            for name, cells in table.cells.items()
        )
        enough = all(comparison.enough for comparison in table.comparisons.values())
        told = "with paired intervals over contexts" if enough else "too few contexts for intervals"
        where = f"{count(table.n_contexts, 'search context')}, on which candidates were chosen: no evidence"
        if study.table_split == "test":
            where = f"{count(table.n_contexts, 'test context')} that neither search nor validation saw"
        yield "accuracy", "Accuracy by depth", (
            f"On {where}; over the depths, {ends}. Above: Wilson intervals of each accuracy, by the questions of that "
            f"depth. Below: gain over the base model, {told} ({100 * study.confidence:g} % both)."
        )  # fmt: skip
    if study.trials:
        n, whole = len(study.trials), [t for t in study.trials if t.contexts >= study.search_contexts]
        best = max((t.fitness for t in whole), default=-math.inf)
        reached = f"the best reached {best:+.4f}" if math.isfinite(best) else "none with a finite score"
        if study.ascent:
            yield "ascent", "The steps of gradients", f"{words.ascent_words(study)}."
        if study.scan:
            yield "scan", "The layer scan", f"{words.scan_words(study)} Whiskers: two standard errors of each."
        yield "fitness", "Fitness over evaluations", (
            f"{count(n, 'candidate')}; {len(whole)} saw all {count(study.search_contexts, 'search context')}, "
            f"{reached}. Fitness is the gain in the answers' log-probability over the base model, in {study.unit}"
            f"{_SCALED if study.unit != 'nats' else ' per answer token'}; of a candidate dropped early that on the "
            "contexts it saw."
        )  # fmt: skip
        shown = len(drawn(study.trials))
        which = "Every candidate" if shown == n else f"{shown} of {n} candidates, evenly chosen"
        said = f"{which}, coloured by when it was tried, and the best curve."
        if shows_layers(study):
            yield "population", "The population over time", said
    if shows_front(study):
        front, found = study.front, "none of them better than the base model"
        if front.best:
            found = f"{len(front.best)} of them on the front: nothing else gains as much at as little KL"
        yield "front", "Gain against change of ordinary text", (
            f"{count(len(front.points), 'candidate')} of which both are known, {found}. Each is at the larger of its "
            "KL divergences on short and on long text, the line ends at the other one; the scale is of square roots. "
            f"The best on the front within the limit ({limit_words(study)}) is chosen"
            f"{f', which passes over {len(front.passed_over)}' if front.passed_over else ''}."
        )  # fmt: skip
    if study.costs:
        text = f"{cost_words(study.total)} of work, summed over workers."
        planned = len(study.trials) * study.search_contexts
        saved = 1.0 - sum(t.contexts for t in study.trials) / planned if planned else 0.0
        if saved > 0.0:
            text += f" Dropping candidates early saved {saved:.0%} of the search's evaluations."
        yield "cost", "Cost", text


def _interval(gain: Interval, comparison: Comparison) -> str:
    """An interval in points; nothing where the comparison that it is of has too few contexts for one."""
    if not comparison.enough or not math.isfinite(gain.low):
        return ""
    return f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
