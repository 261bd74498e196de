"""Variance of candidate minus base over questions and contexts, which decides how many questions to ask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..sample import Components
from ..scores import ContextScore

Sides = tuple[Sequence[ContextScore], Sequence[ContextScore]]
"""The base model and a candidate on the same contexts."""


def components(
    base: Sequence[ContextScore], other: Sequence[ContextScore], scales: Mapping[str, float] | None = None
) -> Components | None:
    """Return the variance components of ``other`` minus ``base`` in log-probability, nats² (in ``scales`` of tasks).

    One-way random effects by analysis of variance (Searle, Casella and McCulloch 1992, section 3.6); a negative
    estimate counts as 0. None where a context has fewer than two probes, or something is not finite.
    """
    rows = [
        np.array([b.log_probability - a.log_probability for a, b in zip(one.probes, two.probes, strict=True)])
        / (scales or {}).get(one.task, 1.0)
        for one, two in zip(base, other, strict=True)
    ]
    if not rows or min(map(len, rows)) < 2 or not all(np.isfinite(row).all() for row in rows):
        return None
    n, sizes = len(rows), np.array([len(row) for row in rows], dtype=np.float64)
    within = math.fsum(float(((row - row.mean()) ** 2).sum()) for row in rows) / float(sizes.sum() - n)
    if n == 1:
        return Components(within, None)
    means, total = np.array([row.mean() for row in rows]), float(sizes.sum())
    grand = float((sizes * means).sum()) / total
    between = float((sizes * (means - grand) ** 2).sum()) / (n - 1)
    size = (total - float((sizes**2).sum()) / total) / (n - 1)
    return Components(within, max(0.0, (between - within) / size))


def typical(sides: Sequence[Sides]) -> Components | None:
    """Return the medians of the `components` of several candidates; None if none has any."""
    found = [one for one in (components(*side) for side in sides) if one is not None]
    if not found:
        return None
    between = [one.between for one in found if one.between is not None]
    return Components(float(np.median([one.within for one in found])), float(np.median(between)) if between else None)


def variation_text(found: Components, contexts: int, probes: int) -> str:
    """Say what they mean for a search that asks so many questions."""
    error = found.standard_error(contexts, probes)
    between = "" if found.between is None else f", {math.sqrt(found.between):.2g} between contexts"
    many = "1 context" if contexts == 1 else f"{contexts} contexts"
    return (
        f"candidate minus base: standard deviation {math.sqrt(found.within):.2g} nats over the questions of a context"
        f"{between}; {many} of {probes} questions measure a gain to {error:.2g} nats (standard error)"
    )
