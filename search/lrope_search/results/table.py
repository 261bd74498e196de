"""Accuracy and log-probability by depth, side by side: as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lrope_gguf.text import sparkline

from ..scores import ContextScore
from .comparison import Comparison, compare, depth_groups
from .intervals import Interval, Strata, finite, share_interval


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
            **({"tasks": {name: self._task_json(name) for name in self.tasks}} if self.tasks else {}),
        }

    def _task_json(self, name: str) -> dict[str, Any]:
        return {"weight": self.weights[name], **self.tasks[name].json()}

    def _pictures(self) -> list[str]:
        width = max(map(len, self.cells))
        return [
            f"{name:<{width}}  {sparkline([cell.accuracy for cell in cells], 0.0, 1.0)}  accuracy by depth"
            for name, cells in self.cells.items()
        ]

    def _gains(self) -> list[str]:
        lines = []
        for name, comparison in self.comparisons.items():
            accuracy, log_p = comparison.accuracy_gain, comparison.log_probability_gain
            text = f"{name}: accuracy {100 * accuracy.mean:+.1f} points"
            if comparison.enough:
                text += f" [{100 * accuracy.low:+.1f}, {100 * accuracy.high:+.1f}]"
                text += f", log-probability {log_p.mean:+.4f} [{log_p.low:+.4f}, {log_p.high:+.4f}]"
                text += f" ({100 * comparison.confidence:g} % bootstrap intervals over {self.n_contexts} contexts)"
            else:
                text += f", log-probability {log_p.mean:+.4f} (too few contexts for an interval)"
            lines.append(text)
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


def depth_table(
    sides: Mapping[str, Sequence[ContextScore]],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    weights: Mapping[str, float] | None = None,
    over: bool = False,
) -> DepthTable:
    """Tabulate ``sides``, the first of which is the base; all are of the same contexts and probes.

    Args:
        sides: the scores of each, by name.
        seed: of the bootstrap, see `compare`.
        confidence: of its intervals.
        weights: of several tasks, whose scores name them; 1 by default.
        over: whether to compare the last side with the one before it too, if that is not the base.

    Raises:
        ValueError: no contexts, or not the same ones.
    """
    (_, base), *others = sides.items()
    if not base:
        raise ValueError("nothing to compare")
    options: dict[str, Any] = {"seed": seed, "confidence": confidence, "weights": weights}
    tasks = list(dict.fromkeys(score.task for score in base))
    alone = {task: depth_table(_of_task(sides, task), **options) for task in tasks} if len(tasks) > 1 else {}
    depths, row = depth_groups([probe.depth for score in base for probe in score.probes])
    comparisons = {name: compare(base, scores, **options) for name, scores in others}
    between = compare(others[-2][1], others[-1][1], **options) if over and len(others) > 1 else None
    weights = {task: (weights or {}).get(task, 1.0) for task in tasks}
    strata = Strata(np.array([tasks.index(score.task) for score in base]), np.array(list(weights.values())))
    context = np.repeat(np.arange(len(base)), [len(score.probes) for score in base])
    every = np.ones(len(row), bool)
    cells, totals = {}, {}
    for name, scores in sides.items():
        correct = np.array([probe.correct for score in scores for probe in score.probes], np.float64)
        log_p = np.array([probe.log_probability for score in scores for probe in score.probes])
        found = [
            Cell(
                strata.mean(correct[at], context[at]),
                strata.mean(log_p[at], context[at]),
                share_interval(correct[at], context[at], confidence, strata),
            )
            for at in (*(row == i for i in range(len(depths))), every)
        ]
        each = np.arange(len(base))
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
        weights=weights if len(tasks) > 1 else {},
        tasks=alone,
    )


def _of_task(sides: Mapping[str, Sequence[ContextScore]], task: str) -> dict[str, list[ContextScore]]:
    return {name: [score for score in scores if score.task == task] for name, scores in sides.items()}


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
