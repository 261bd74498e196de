"""Accuracy and log-probability by depth, side by side: as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lrope_gguf.text import sparkline

from ..scores import ContextScore
from .comparison import Comparison, compare, depth_groups
from .intervals import Interval, Strata, by_probe, finite, share_interval


@dataclass(frozen=True)
class Cell:
    """Means over probes: accuracy 0 to 1 with its interval, log-probability in nats per token of the value."""

    accuracy: float
    log_probability: float
    interval: Interval


@dataclass(frozen=True)
class DepthTable:
    """The same contexts under several settings; the first is the base.

    Attributes:
        depths: the rows.
        cells: of each side, a cell a depth.
        totals: of each side, over all contexts.
        comparisons: of each side but the base, against it.
        over: the last side but the base against the one before it, if wanted.
        weights: of several tasks, each one's; all means are then weighted means of the tasks' means.
        tasks: each of several tasks by itself.
    """

    n_contexts: int
    n_probes: int
    depths: tuple[float, ...]
    cells: dict[str, tuple[Cell, ...]]
    totals: dict[str, Cell]
    comparisons: dict[str, Comparison]
    over: Comparison | None = None
    weights: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, DepthTable] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return an aligned table, the accuracies as a picture, a line of gains for each side, and each task's."""
        base, *others = self.totals
        heads = [base, *(head for name in others for head in (name, "gain"))]
        left, right = [["accuracy, %"], heads], [["log-probability"], heads]
        for i in range(len(self.depths) + 1):
            cells = {name: (*self.cells[name], self.totals[name])[i] for name in self.totals}
            left.append(_with_gains({name: 100.0 * cell.accuracy for name, cell in cells.items()}, 1))
            right.append(_with_gains({name: cell.log_probability for name, cell in cells.items()}, 4))
        labels = ["", "depth", *(f"{depth:.2f}" for depth in self.depths), "all"]
        columns = zip(labels, _aligned(left), _aligned(right), strict=True)
        lines = [f"{label:>5}   {accuracy}   {log_p}".rstrip() for label, accuracy, log_p in columns]
        lines.insert(-1, "-" * len(lines[-1]))
        return "\n".join([*lines, "", *self._pictures(), *self._gains(), *self._by_task()])

    def json(self) -> dict[str, Any]:
        """Return everything, for `json.dumps`; a number that is not finite becomes None."""
        return {
            "contexts": self.n_contexts,
            "probes": self.n_probes,
            **{name: _cell(cell) for name, cell in self.totals.items()},
            "difference": {
                name: {
                    "accuracy": comparison.accuracy_gain.json(),
                    "log_probability": comparison.log_probability_gain.json(),
                    "confidence": comparison.confidence,
                    "significant": comparison.significant,
                }
                for name, comparison in self.comparisons.items()
            },
            "by_depth": [
                {"depth": depth, **{name: _cell(cells[i]) for name, cells in self.cells.items()}}
                for i, depth in enumerate(self.depths)
            ],
        } | (
            {"tasks": {name: {"weight": self.weights[name], **alone.json()} for name, alone in self.tasks.items()}}
            if self.tasks
            else {}
        )

    def _pictures(self) -> list[str]:
        width = max(map(len, self.cells))
        return [
            f"{name:<{width}}  {sparkline([cell.accuracy for cell in cells], 0.0, 1.0)}  accuracy by depth"
            for name, cells in self.cells.items()
        ]

    def _gains(self) -> list[str]:
        lines = []
        for name, comparison in self.comparisons.items():
            how = f"{100 * comparison.confidence:g} % bootstrap intervals over {self.n_contexts} contexts"
            how = how if comparison.enough else "too few contexts for an interval"
            lines.append(f"{name}: {gains_words(comparison)} ({how})")
        return lines

    def _by_task(self) -> list[str]:
        """A row for each task and side."""
        if not self.tasks:
            return []
        rows = [["task", "weight", "contexts", "side", "accuracy, %", "gain, points", "log-probability gain"]]
        for name, table in self.tasks.items():
            base = f"{100 * next(iter(table.totals.values())).accuracy:.1f}"
            rows.append([name, f"{self.weights[name]:g}", str(table.n_contexts), "base", base, "", ""])
            for side, comparison in table.comparisons.items():
                points = with_interval(comparison, comparison.accuracy_gain, 100.0, 1)
                nats = with_interval(comparison, comparison.log_probability_gain, 1.0, 4)
                rows.append(["", "", "", side, f"{100 * comparison.accuracy:.1f}", points, nats])
        return ["", *left_aligned(rows)]


def left_aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of a table as lines, all columns flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def with_interval(comparison: Comparison, gain: Interval, scale: float, digits: int, unit: str = "") -> str:
    """Return a gain, the ``unit`` as it is to stand behind it, and its interval, if there are enough contexts."""
    text = f"{scale * gain.mean:+.{digits}f}{unit}"
    if not comparison.enough:
        return text
    return f"{text} [{scale * gain.low:+.{digits}f}, {scale * gain.high:+.{digits}f}]"


def gains_words(comparison: Comparison) -> str:
    """Return the gains in accuracy and log-probability in words, each `with_interval`."""
    points = with_interval(comparison, comparison.accuracy_gain, 100.0, 1, " points")
    return f"accuracy {points}, log-probability {with_interval(comparison, comparison.log_probability_gain, 1.0, 4)}"


def depth_table(
    sides: Mapping[str, Sequence[ContextScore]],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    weights: Mapping[str, float] | None = None,
    over: bool = False,
) -> DepthTable:
    """Tabulate ``sides``, the first of which is the base; all are of the same contexts and probes.

    Raises `ValueError`: no contexts, or not the same ones.

    Args:
        sides: the scores of each, by name.
        seed: of the bootstrap, see `compare`.
        confidence: of its intervals.
        weights: of several tasks, whose scores name them; 1 by default.
        over: whether to compare the last side with the one before it too, if that is not the base.
    """
    (_, base), *others = sides.items()
    if not base:
        raise ValueError("nothing to compare")
    options: dict[str, Any] = {"seed": seed, "confidence": confidence, "weights": weights}
    tasks = dict.fromkeys(score.task for score in base)
    by_task = {t: {name: [s for s in of_side if s.task == t] for name, of_side in sides.items()} for t in tasks}
    alone = {task: depth_table(own, **options) for task, own in by_task.items()} if len(tasks) > 1 else {}
    depths, row = depth_groups([probe.depth for score in base for probe in score.probes])
    comparisons = {name: compare(base, scores, **options) for name, scores in others}
    between = compare(others[-2][1], others[-1][1], **options) if over and len(others) > 1 else None
    strata, each, every = Strata.of(base, weights), np.arange(len(base)), np.ones(len(row), bool)
    cells, totals = {}, {}
    for name, scores in sides.items():
        correct, log_p, context = by_probe(scores)
        found = [
            Cell(
                strata.mean(correct[at], context[at]),
                strata.mean(log_p[at], context[at]),
                share_interval(correct[at], context[at], confidence, strata),
            )
            for at in (*(row == i for i in range(len(depths))), every)
        ]
        cells[name] = tuple(found[:-1])
        totals[name] = Cell(
            strata.mean([score.accuracy for score in scores], each),
            strata.mean([score.log_probability for score in scores], each),
            found[-1].interval,
        )
    return DepthTable(
        n_contexts=len(base),
        n_probes=len(row),
        depths=tuple(depths.tolist()),
        cells=cells,
        totals=totals,
        comparisons=comparisons,
        over=between,
        weights=dict(zip(tasks, strata.weight.tolist(), strict=True)) if len(tasks) > 1 else {},
        tasks=alone,
    )


def _with_gains(values: Mapping[str, float], digits: int) -> list[str]:
    (_, base), *others = values.items()
    gains = (text for _, value in others for text in (f"{value:.{digits}f}", f"{value - base:+.{digits}f}"))
    return [f"{base:.{digits}f}", *gains]


def _aligned(block: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal length: a title over right-aligned columns."""
    (title,), *rows = block
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    width = max(len(title), len(lines[0]))
    return [title.ljust(width), *(line.rjust(width) for line in lines)]


def _cell(cell: Cell) -> dict[str, float | None]:
    return {"accuracy": finite(cell.accuracy), "log_probability": finite(cell.log_probability)}
