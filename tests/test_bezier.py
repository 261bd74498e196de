"""Bézier curves, against SciPy's Bernstein polynomials and its bracketing root finder."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BPoly
from scipy.optimize import brentq

from lrope_gguf.curve import Curve, evaluate, height, layer_positions

ys = st.lists(st.floats(0.5, 4), min_size=2, max_size=8)


@st.composite
def well_conditioned(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Control points whose x are apart, so that dy/dx is bounded."""
    heights = draw(ys)
    steps = np.array([draw(st.floats(0.5, 1.5)) for _ in heights[1:]])
    xs = np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
    xs[-1] = 1.0
    return xs.tolist(), heights


@given(ys, st.floats(0, 1))
def test_evaluation_is_bernsteins(heights: list[float], t: float) -> None:
    expected = float(BPoly(np.array(heights)[:, None], [0.0, 1.0])(t))
    assert evaluate(heights, t) == pytest.approx(expected, rel=0, abs=1e-14 * max(heights))


@given(well_conditioned(), st.integers(1, 40))
def test_height_is_that_of_the_bracketed_root(curve: tuple[list[float], list[float]], n_layer: int) -> None:
    xs, heights = curve
    of_x, of_y = (BPoly(np.array(values)[:, None], [0.0, 1.0]) for values in curve)
    for x in layer_positions(n_layer):
        t = x if x in (0.0, 1.0) else brentq(lambda t, x=x: float(of_x(t)) - x, 0.0, 1.0, xtol=1e-16, rtol=1e-15)
        # both know t to some 2^-53, and a step of t is one of y by the slope
        slope = max(abs(b - a) for a, b in pairwise(heights)) * len(heights)
        assert height(xs, heights, x) == pytest.approx(float(of_y(t)), rel=0, abs=1e-14 * max(max(heights), slope))


@given(st.lists(st.floats(0, 1), max_size=6), st.data(), st.integers(1, 40))
def test_floats_and_arrays_alike_and_the_ends_exact(inner: list[float], data: st.DataObject, n_layer: int) -> None:
    xs = [0.0, *sorted(inner), 1.0]
    heights = data.draw(st.lists(st.floats(0.5, 4), min_size=len(xs), max_size=len(xs)))
    curve = Curve(tuple(zip(xs, heights, strict=True)))
    factors = curve.factor_list(n_layer)
    assert factors == curve.factors(n_layer).tolist() and len(factors) == n_layer
    assert all(min(heights) <= factor <= max(heights) for factor in factors)
    assert factors[0] == heights[0] and factors[-1] == heights[-1 if n_layer > 1 else 0]


@pytest.mark.parametrize(
    ("xs", "heights", "x", "expected"),
    [
        ((0.0, 0.0, 1.0, 1.0), (1.0, 2.0, 0.6, 1.5), 0.5, 1.2875),  # by symmetry t is a half
        ((0.0, 0.5, 0.5, 0.5, 1.0), (1.0, 2.0, 0.6, 3.0, 1.0), 0.5, 1.6),
        ((0.0, 0.0, 0.0, 1.0), (1.0, 1.0, 1.0, 2.0), 0.125, 1.125),  # x = t^3, y = 1 + t^3
        ((0.0, 1.0), (3.0, 3.0), 0.3, 3.0),
    ],
)
def test_coinciding_x(xs: tuple[float, ...], heights: tuple[float, ...], x: float, expected: float) -> None:
    assert height(xs, heights, x) == pytest.approx(expected, rel=1e-14)


def test_large_curves_take_numpy_and_the_same_values() -> None:
    curve = Curve(tuple((i / 63, 1.0 + i % 2) for i in range(64)))
    assert curve.factor_list(5) == curve.factors(5).tolist() == Curve(curve.control_points).factor_list(5)


def test_layer_positions() -> None:
    assert layer_positions(1) == [0.0] and layer_positions(3) == [0.0, 0.5, 1.0]
