"""The pictures of a study's report: each is drawn once and comes as PNG and as SVG that follows a page's colours."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lrope_gguf.curve import Point
from lrope_gguf.plot import COLOURS, bezier, draw_factors, drawing, drawn_into, layer_axis, rendered
from lrope_gguf.text import printable

from ..results.front import FrontPoint
from ..results.summary import StudySummary, Trial
from ..results.table import DepthTable
from .text import shows_front, shows_layers, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

ORDER = ("#e3d9a6", "#bcd48f", "#86c99a", "#4fb7a8", "#2b9bae", "#2a7ba6", "#345995", "#39316b")
"""From the first candidates to the last: lightness falls evenly, so that it needs no eye for colour."""

_CURVES = (COLOURS["curve"], "#009e73", "#cc79a7", "#e69f00")
"""Of several curves, more of the same palette."""
_UNIFORM = "s^v<>"

_MAX_CURVE_POINTS = 8000
_MAX_MARKERS = 1500
_SIZE = (4.9, 3.4)  # inches; small, so that its text can still be read on a telephone


@dataclass(frozen=True)
class Picture:
    """One picture: ``svg`` is an element for an HTML page, without a title; ``png`` a file."""

    name: str
    svg: str
    png: bytes


def draw_pictures(study: StudySummary) -> dict[str, Picture]:
    """Draw those pictures for which the study has something to show, by name.

    Colours in the SVG are the CSS variables ``--ink``, ``--curve``, ... of `COLOURS`, ``--order-0`` to ``--order-7``
    for the order of candidates, and ``--font`` is the font.
    """
    wanted: dict[str, tuple[bool, Callable[[Figure, StudySummary], None]]] = {
        "factors": (study.factors is not None, _factors),
        "accuracy": (study.table is not None, lambda figure, study: _draw_table(figure, study.table)),
        "ascent": (bool(study.ascent), _ascent),
        "scan": (bool(study.scan), _scan),
        "fitness": (bool(study.trials), _fitness),
        "population": (bool(study.trials) and shows_layers(study), _population),
        "front": (shows_front(study), _front),
        "cost": (bool(study.costs), _cost),
    }
    return {name: _picture(name, draw, study) for name, (present, draw) in wanted.items() if present}


def drawn(trials: Sequence[Trial]) -> Sequence[Trial]:
    """The trials whose curves are drawn: all, or as many as keep a page small, evenly spread."""
    points = max((len(_vertices(trial)) for trial in trials), default=1)
    return _thinned(trials, max(_MAX_CURVE_POINTS // points, 1))


def _thinned(items: Sequence[Any], limit: int) -> Sequence[Any]:
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / max(limit - 1, 1))] for i in range(limit)]


def _picture(name: str, draw: Callable[[Figure, StudySummary], None], study: StudySummary) -> Picture:
    from matplotlib.figure import Figure

    with drawing(f"lrope-{name}", font_size=9.0):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure, study)
        png = rendered(figure, "png")
        figure.set_facecolor("none")
        return Picture(name, _themed(rendered(figure, "svg").decode()), png)


def _themed(svg: str) -> str:
    """The `svg` element alone, its size and colours left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>|<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<defs>\s*<style type=\"text/css\">.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg .*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names of groups, the same in every picture
    svg = re.sub(r"(?:'[^']*', )*(?:'[^']*'|sans-serif)(?=[\";])", "var(--font)", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    names = {colour: name for name, colour in COLOURS.items()} | {c: f"order-{i}" for i, c in enumerate(ORDER)}
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{names[m[0]]})" if m[0] in names else m[0], svg).strip()


def _factors(figure: Figure, study: StudySummary) -> None:
    axes = figure.add_subplot()
    assert study.best is not None and study.factors is not None
    if study.rows:
        _heads(axes, study)
        return
    uniform = study.uniform
    labels: Any = {"curve_label": "Bézier curve", "factors_label": "factors"}
    also = () if uniform is None else (uniform.factor,)
    draw_factors(axes, study.factors, control_points=study.best.control_points, also=also, **labels)
    if uniform is not None and not uniform.where:
        axes.axhline(uniform.factor, color=COLOURS["uniform"], linewidth=1.4, label=uniform.name)
    elif uniform is not None:
        axes.step(range(len(uniform.factors)), uniform.factors, where="mid", color=COLOURS["uniform"], linewidth=1.4,
                  label=uniform.name)  # fmt: skip
    _legend_above(axes, 4)


def _heads(axes: Axes, study: StudySummary) -> None:
    """A dot a head, beside each other in their layer."""
    axes.axhline(1, color=COLOURS["base"], linewidth=1, linestyle="--", zorder=1)
    names = {"head_factors": ("curve", "factors of KV heads"), "query_scales": ("ink", "query scales of heads")}
    for name, rows in study.rows.items():
        places = [
            (layer + (i + 1) / (len(row) + 1) - 0.5, value)
            for layer, row in enumerate(rows)
            for i, value in enumerate(row)
        ]
        colour, label = names[name]
        axes.plot(
            *zip(*places, strict=True), color=COLOURS[colour], linestyle="none", marker="o", markersize=3, label=label
        )
    layer_axis(axes, len(study.factors or ()))
    axes.set_ylabel("factor")
    _legend_above(axes, 2)


def plot_table(path: str | os.PathLike[str], table: DepthTable, *, title: str = "") -> None:
    """Draw accuracy and gain by depth of all sides into a PNG or SVG file, as the end of its name says.

    An existing file is replaced; control characters of ``title`` are left out. Raises `LropeError`: the name ends
    otherwise, matplotlib is missing, or the file cannot be written.
    """
    with drawn_into(path, (8, 5.5)) as figure:
        _draw_table(figure, table)
        figure.suptitle(printable(title, 90), parse_math=False)


def _draw_table(figure: Figure, table: DepthTable | None) -> None:
    assert table is not None
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    gaps = np.diff(table.depths)
    step = 0.12 * float(gaps.min() if len(gaps) else 1.0)
    looks = _looks(list(table.cells))
    for i, (name, look) in enumerate(looks.items()):
        x = np.array(table.depths) + step * (i - (len(looks) - 1) / 2)
        ends = [(cell.accuracy, cell.interval.low, cell.interval.high) for cell in table.cells[name]]
        _whiskers(upper, look, x, 100 * np.array(ends))
        comparison = table.comparisons.get(name)
        if comparison is not None:
            gains, told = [row.accuracy_gain for row in comparison.by_depth], comparison.enough
            ends = [(g.mean, g.low if told else g.mean, g.high if told else g.mean) for g in gains]
            _whiskers(lower, look, x, 100 * np.array(ends))
    upper.set_ylim(-4, 104)
    upper.set_ylabel("accuracy, %")
    lower.axhline(0, color=COLOURS["base"], linewidth=1, linestyle="--", zorder=1)
    lower.set_ylabel("gain, points")
    lower.set_xlabel("depth of the answer in the context (0 first, 1 last)")
    low, high = lower.get_ylim()
    lower.set_ylim(min(low, -5.0), max(high, 5.0))
    lower.set_xlim(min(table.depths) - 0.04, max(table.depths) + 0.04)
    _legend_above(upper, 3)
    figure.align_ylabels([upper, lower])


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each side is drawn, by its name: the base, uniform factors, and curves of whatever name."""
    looks: dict[str, dict[str, Any]] = {}
    colours, markers = itertools.cycle(_CURVES), itertools.cycle(_UNIFORM)
    for name in names:
        looks[name] = {"label": name, "linewidth": 1.2, "linestyle": "-"}
        if name == "base":
            looks[name] |= {"color": COLOURS["base"], "marker": "D", "linestyle": "--", "zorder": 2}
        elif name.startswith("uniform"):
            looks[name] |= {"color": COLOURS["uniform"], "marker": next(markers), "zorder": 3}
        else:
            looks[name] |= {"color": next(colours), "marker": "o", "linewidth": 1.8, "zorder": 4}
    return looks


def _whiskers(axes: Axes, look: dict[str, Any], x: NDArray[np.float64], rows: NDArray[np.float64]) -> None:
    """Means with the ends of their intervals, shape (n, 3), joined by a line."""
    mean, low, high = rows.T
    errors = np.maximum([mean - low, high - mean], 0.0)
    axes.errorbar(x, mean, yerr=errors, markersize=4, elinewidth=1, capsize=2, **look)


def _ascent(figure: Figure, study: StudySummary) -> None:
    """Log-probability by task and KL over the steps."""
    panels = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(study.ascent) + 1)
    for order, name in enumerate(study.ascent[-1].gains):
        values = [step.gains.get(name, math.nan) for step in study.ascent]
        panels[0].plot(steps, values, "o-", color=ORDER[-1 - order % len(ORDER)], label=name, markersize=4)
    panels[1].plot(steps, [step.divergence for step in study.ascent], "o-", color=COLOURS["uniform"], markersize=4)
    panels[0].set_ylabel("log-probability, nats")
    panels[1].set_ylabel("KL, nats a token")
    panels[1].set_xlabel("step")
    _legend_above(panels[0], 4)


def _scan(figure: Figure, study: StudySummary) -> None:
    """Bars over the layers: what each does alone, raised and lowered, with two standard errors."""
    axes = figure.add_subplot()
    scan = study.scan
    finite = [effect.fitness for effect in scan if math.isfinite(effect.fitness)]
    floor, top = min([*finite, 0.0]), max([*finite, 0.0])
    low, high = floor - 0.15 * max(top - floor, 1e-4), top + 0.15 * max(top - floor, 1e-4)
    for label, colour, shift, side in (
        ("raised", COLOURS["curve"], -0.2, [e for e in scan if e.factor > 1.0]),
        ("lowered", COLOURS["uniform"], 0.2, [e for e in scan if e.factor < 1.0]),
    ):
        if side:
            middles = [(e.layers[0] + e.layers[-1]) / 2.0 + shift * len(e.layers) for e in side]
            widths = [0.36 * len(e.layers) for e in side]
            heights = [e.fitness if math.isfinite(e.fitness) else low for e in side]
            shown = f"{label}, {min(e.factor for e in side):.3g} alone"
            axes.bar(middles, heights, widths, color=colour, label=shown, zorder=3)
            errors = [2.0 * e.error if math.isfinite(e.error) and math.isfinite(e.fitness) else 0.0 for e in side]
            axes.errorbar(middles, heights, errors, linestyle="none", ecolor=COLOURS["ink"], elinewidth=0.8, zorder=4)
    axes.axhline(0, color=COLOURS["base"], linewidth=1, zorder=2)
    layer_axis(axes, len(study.trials[0].factors))
    axes.set_ylim(low, high)
    axes.set_ylabel(f"gain, {study.unit}")
    _legend_above(axes, 3)


def _fitness(figure: Figure, study: StudySummary) -> None:
    axes = figure.add_subplot()
    x, y = np.arange(1, len(study.trials) + 1), np.array([trial.fitness for trial in study.trials])
    whole = np.array([trial.contexts >= study.search_contexts for trial in study.trials])
    finite = np.isfinite(y)
    floor = _floor(y[finite])
    shown = np.zeros(len(x), bool)
    shown[_thinned(range(len(x)), _MAX_MARKERS)] = True
    low = floor - 0.06 * max(float(y[finite].max(initial=0.0)) - floor, 1e-3)
    axes.axhline(0, color=COLOURS["base"], linewidth=1, linestyle="--", label="base model", zorder=1)
    kinds: tuple[tuple[str, Any, dict[str, Any], str], ...] = (
        ("dropped early", finite & ~whole & (y >= floor), {"color": COLOURS["muted"], "markerfacecolor": "none"}, "o"),
        ("saw all contexts", finite & whole & (y >= floor), {"color": COLOURS["uniform"]}, "o"),
        ("below the axis", finite & (y < floor), {"color": COLOURS["muted"]}, "v"),
        ("not a finite number", ~finite, {"color": COLOURS["ink"]}, "x"),
    )
    for label, chosen, colour, marker in kinds:
        if (chosen & shown).any():
            at = chosen & shown
            heights = np.where(finite[at], np.maximum(y[at], low), low)
            axes.plot(x[at], heights, linestyle="none", marker=marker, markersize=4, label=label, **colour, zorder=3,
                      clip_on=False)  # fmt: skip
    best = study.best_so_far()
    steps = [0, *(i for i in range(1, len(best)) if best[i] != best[i - 1]), len(best) - 1]
    axes.step([x[i] for i in steps], [best[i] for i in steps], where="post", color=COLOURS["curve"], linewidth=1.8,
              label="best so far", zorder=4)  # fmt: skip
    axes.set_xlim(0.5, len(x) + 0.5)
    axes.set_ylim(low, None)
    axes.margins(y=0.06)
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("candidate, in order of asking")
    axes.set_ylabel(f"fitness, {study.unit}")
    _legend_above(axes, 3)


def _floor(fitness: NDArray[np.float64]) -> float:
    """Where the axis begins: a few hopeless candidates must not flatten the rest."""
    values = np.append(fitness, 0.0)
    top, low = float(values.max()), float(values.min())
    reach = 3.0 * max(top - float(np.quantile(values, 0.5)), 1e-3)
    return max(low, top - reach)


def _population(figure: Figure, study: StudySummary) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    axes = figure.add_subplot()
    n_layer, n = len(study.trials[0].factors), len(study.trials)
    axes.axhline(1, color=COLOURS["base"], linewidth=1, linestyle="--", zorder=1)
    order = {id(trial): i for i, trial in enumerate(study.trials)}
    bins: dict[int, list[Trial]] = {}
    for trial in drawn(study.trials):
        bins.setdefault(len(ORDER) * order[id(trial)] // n, []).append(trial)
    values = [1.0]
    for i, trials in sorted(bins.items()):
        vertices: list[Point] = []
        codes: list[Any] = []
        for trial in trials:
            points = _vertices(trial)
            vertices += points
            codes += [Path.MOVETO, *([_code(trial)] * (len(points) - 1))]
            values += trial.factors
        axes.add_patch(
            PathPatch(Path(vertices, codes), facecolor="none", edgecolor=ORDER[i], linewidth=0.8, zorder=2 + i / 10)
        )  # fmt: skip
        if n_layer == 1:
            axes.plot([0] * len(trials), [t.factors[0] for t in trials], linestyle="none", marker="_", color=ORDER[i])
    if study.factors is not None:
        values += study.factors
        axes.plot(range(n_layer), study.factors, color=COLOURS["curve"], linewidth=2.2, label="best curve", zorder=4,
                  marker="o" if n_layer == 1 else "")  # fmt: skip
    layer_axis(axes, n_layer)
    low, high = min(values), max(values)
    margin = max(0.05 * (high - low), 0.02)
    axes.set_ylim(low - margin, high + margin)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_ylabel("factor")
    edges = [0.5 + n * i / len(ORDER) for i in range(len(ORDER) + 1)]
    ticks = sorted({round(1 + (n - 1) * i / 4) for i in range(5)})
    shades = ScalarMappable(BoundaryNorm(edges, len(ORDER)), ListedColormap(ORDER))
    bar = figure.colorbar(shades, ax=axes, label="candidate, in order of asking", ticks=ticks, format="%.0f")
    bar.outline.set_visible(False)
    if study.factors is not None:
        _legend_above(axes, 1)


def _front(figure: Figure, study: StudySummary) -> None:
    axes = figure.add_subplot()
    front = study.front
    points = [point for point in front.points if math.isfinite(point.kl) and math.isfinite(point.gain)]
    top = max([*(point.kl for point in points), 1e-6])
    limit = front.limit if front.limit <= 2.0 * top else math.inf  # one far off would press all points together
    edge = 1.1 * max(top, limit if math.isfinite(limit) else top)
    # matplotlib asks for a margin below zero too
    axes.set_xscale("function", functions=(lambda values: np.sqrt(np.maximum(values, 0.0)), np.square))
    axes.axhline(0, color=COLOURS["base"], linewidth=1, linestyle="--", zorder=1)
    steps = [(0.0, 0.0), *((point.kl, point.gain) for point in front.best)]
    axes.step([*(kl for kl, _ in steps), edge], [*(gain for _, gain in steps), steps[-1][1]], where="post",
              color=COLOURS["uniform"], linewidth=1.4, label="front", zorder=2)  # fmt: skip
    for point in points:
        axes.plot([point.short, point.long], [point.gain] * 2, color=COLOURS["muted"], linewidth=0.8, zorder=2)
    groups: tuple[tuple[str, Sequence[FrontPoint], dict[str, Any]], ...] = (
        ("candidates", points, {"color": COLOURS["muted"], "markersize": 5}),
        ("", front.best, {"color": COLOURS["uniform"], "markersize": 5}),
        ("chosen", [p for p in points if study.finished and p.factors == study.factors],
         {"color": COLOURS["curve"], "markersize": 8}),
    )  # fmt: skip
    for i, (label, group, style) in enumerate(groups):
        if group:
            axes.plot([p.kl for p in group], [p.gain for p in group], linestyle="none", marker="o", zorder=3 + i,
                      label=label or None, clip_on=False, **style)  # fmt: skip
    axes.plot([0], [0], linestyle="none", marker="s", markersize=5, color=COLOURS["base"], label="base model", zorder=3,
              clip_on=False)  # fmt: skip
    if math.isfinite(limit):
        axes.axvline(limit, color=COLOURS["ink"], linewidth=1, linestyle=":", label=f"limit {limit:g}", zorder=1)
    axes.set_xlim(0.0, edge)
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("KL on ordinary text, nats a token (short and long)")
    axes.set_ylabel(f"gain on validation, {study.unit}")
    _legend_above(axes, 5)


def _vertices(trial: Trial) -> list[Point]:
    """Of the path that is drawn for a candidate, in layers: Bézier control points where SVG has such a curve."""
    points, last = trial.control_points, len(trial.factors) - 1
    if points is None:
        return [(float(layer), s) for layer, s in _thinned(list(enumerate(trial.factors)), 128)]
    if _code(trial) == 2 and len(points) > 2:
        points = tuple(zip(*bezier(points, 24), strict=True))
    return [(last * x, y) for x, y in points]


def _code(trial: Trial) -> int:
    """Matplotlib's path code: LINETO 2, CURVE3 3, CURVE4 4."""
    return {3: 3, 4: 4}.get(len(trial.control_points or ()), 2)


def _cost(figure: Figure, study: StudySummary) -> None:
    costs = study.costs
    unit, seconds = time_unit(max(cost.seconds for cost in costs))
    scale, thousands = (1e6, "million tokens") if max(c.tokens for c in costs) >= 1e6 else (1e3, "thousand tokens")
    columns = (
        (thousands, [cost.tokens / scale for cost in costs]),
        (unit, [cost.seconds / seconds for cost in costs]),
        ("tokens a second", [cost.rate for cost in costs]),
    )
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (label, values), colour in zip(panels, columns, ("uniform", "uniform", "base"), strict=True):
        widths = [value if math.isfinite(value) else 0.0 for value in values]
        axes.barh(range(len(costs)), widths, color=COLOURS[colour], height=0.62)
        for i, value in enumerate(values):
            axes.annotate(
                f"{value:.3g}" if 0 < value < 100 else f"{value:,.0f}" if math.isfinite(value) else "not measured",
                (widths[i], i), (3, 0), textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        axes.set_xlim(0, 1.45 * (max(widths) or 1.0))
        axes.set_xlabel(label)
        axes.set_xticks([])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(left=False)
    panels[0].set_yticks(range(len(costs)), [cost.phase.replace(", ", ",\n") for cost in costs])
    panels[0].invert_yaxis()
    figure.set_size_inches(_SIZE[0], 0.8 + 0.42 * max(len(costs), 2))


def _legend_above(axes: Axes, columns: int) -> None:
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(columns, len(handles)), borderaxespad=0.2,
        handlelength=1.4, columnspacing=1.0, handletextpad=0.5,
    )  # fmt: skip
