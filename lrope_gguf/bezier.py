"""Bézier curves, evaluated in one place; floats and NumPy arrays alike, so that nothing need be imported."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

Number = TypeVar("Number", bound=Any)
"""A float, or float64 arrays whose shapes broadcast."""

_BISECTIONS = 54  # t is then as near as float64 can tell


def evaluate(coefficients: Sequence[Number], t: Number) -> Number:
    """One coordinate of a curve at parameter `t`, by de Casteljau's construction.

    Args:
        coefficients: that coordinate of the control points.
        t: from 0 to 1.
    """
    row = list(coefficients)
    while len(row) > 1:
        row = [a + t * (b - a) for a, b in pairwise(row)]
    return row[0]


def height(xs: Sequence[Number], ys: Sequence[Number], x: Number) -> Number:
    """The curve's y where its x is `x`, by bisection.

    Args:
        xs: x of the control points, from 0 to 1 without a step back, so that the curve is a function of x.
        ys: y of the control points.
        x: from 0 to 1; at both ends y is that of the end points, exactly, where rounding would keep t from them.
    """
    t: Any = 0.5 + 0.0 * x
    step = 0.25
    for _ in range(_BISECTIONS):
        t = t + step * (2.0 * (evaluate(xs, t) < x) - 1.0)
        step /= 2.0
    y: Number = evaluate(ys, t) * ((x > 0.0) & (x < 1.0)) + ys[0] * (x <= 0.0) + ys[-1] * (x >= 1.0)
    return y


def layer_positions(n_layer: int) -> list[float]:
    """The x of each layer: `l / (n_layer - 1)`, and 0 for a single one."""
    return [layer / max(n_layer - 1, 1) for layer in range(n_layer)]
