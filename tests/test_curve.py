"""Curves and curve files, against SciPy and a JSON Schema validator."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.interpolate import BPoly
from scipy.optimize import brentq

from lrope_gguf.curve import Curve, CurveFile, evaluate, height, layer_positions
from lrope_gguf.errors import LropeError

SCHEMA = json.loads((files("lrope_gguf") / "curve.schema.json").read_text())
GOOD = {"format": "lrope-curve", "version": 1, "control_points": [[0, 1], [0.3, 2], [0.6, 0.8], [1, 1.5]]}
SCALES = {"format": "lrope-curve", "version": 1, "query_scales": [[1, 0.7], [], [1.3, 16]]}
LIST = {"format": "lrope-curve", "version": 1, "layer_factors": [1, 1.1, 0.9]}


@st.composite
def control_points(draw: st.DrawFn) -> tuple[tuple[float, float], ...]:
    inner = sorted(draw(st.lists(st.floats(0, 1), max_size=5)))
    ys = draw(st.lists(st.floats(0.5, 4), min_size=len(inner) + 2, max_size=len(inner) + 2))
    return tuple(zip([0.0, *inner, 1.0], ys, strict=True))


def test_few_layers() -> None:
    assert Curve(((0, 1.5), (1, 3))).factors(1).tolist() == [1.5]
    with pytest.raises(LropeError, match="at least one layer"):
        Curve(((0, 1.5), (1, 3))).factors(0)


BAD_POINTS = {
    "x of control_points[1] is NaN": [[0, 1], [math.nan, 1], [1, 1]],
    "y of control_points[0] is NaN": [[0, math.nan], [1, 1]],
    "y of control_points[1] is infinite": [[0, 1], [1, math.inf]],
    "x of control_points[1] is infinite": [[0, 1], [-math.inf, 1], [1, 1]],
    "y of control_points[1] is zero": [[0, 1], [1, 0]],
    "y of control_points[0] is negative": [[0, -1], [1, 1]],
    "control_points[2] goes back from x = 0.7 to 0.6": [[0, 1], [0.7, 1], [0.6, 1], [1, 1]],
    "control_points[1] goes back from x = 0 to -0.1": [[0, 1], [-0.1, 1], [1, 1]],
    "the first x must be 0": [[0.1, 1], [1, 1]],
    "the last x must be 1": [[0, 1], [0.9, 1]],
    "control_points has 1 points": [[0, 1]],
    "control_points has 0 points": [],
    "control_points has 65 points": [[i / 64, 1] for i in range(65)],
    "control_points[1] has 3 values": [[0, 1], [1, 1, 1]],
    "control_points[1] is int, not a list": [[0, 1], 1],
    "control_points is str, not a list": "0011",
    "y of control_points[0] is True, not a number": [[0, True], [1, 1]],
    "y of control_points[0] is '1', not a number": [[0, "1"], [1, 1]],
    "y of control_points[1] is 5, outside the bounds 0.5 to 4": [[0, 1], [1, 5]],
    "y of control_points[1] is 0.4, outside the bounds": [[0, 1], [1, 0.4]],
}


@pytest.mark.parametrize("message", BAD_POINTS)
def test_bad_control_points(message: str) -> None:
    with pytest.raises(LropeError) as caught:
        Curve(BAD_POINTS[message])  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bounds_are_part_of_the_curve() -> None:
    assert Curve(((0, 1), (1, 8)), bounds=(0.1, 10)).factors(3)[-1] == 8
    for bounds, message in [((2, 1), "reversed"), ((0, 1), "zero"), ((1, 2, 3), "3 values"), ((-1, 2), "negative")]:
        with pytest.raises(LropeError, match=message):
            Curve(((0, 1), (1, 1)), bounds)  # type: ignore[arg-type]


BAD_DOCUMENTS = {
    "is not JSON": "{",
    "is not a JSON object": "[]",
    'its "format" is not "lrope-curve"': '{"version": 1}',
    "its version is 2": json.dumps(GOOD | {"version": 2}),
    "its version is True": json.dumps(GOOD | {"version": True}),
    "its version is None": '{"format": "lrope-curve"}',
    "neither control_points nor layer_factors, head_factors or query_scales": '{"format": "lrope-curve", "version": 1}',
    "holds NaN": '{"format": "lrope-curve", "version": 1, "layer_factors": [NaN]}',
    "holds -Infinity": '{"format": "lrope-curve", "version": 1, "layer_factors": [-Infinity]}',
    "holds 1e999": '{"format": "lrope-curve", "version": 1, "layer_factors": [1], "provenance": 1e999}',
    "layer_factors[1] is zero": json.dumps(LIST | {"layer_factors": [1, 0]}),
    "layer_factors[0] is negative": json.dumps(LIST | {"layer_factors": [-0.5]}),
    f"holds 1{'0' * 39}, too large for a number": json.dumps(LIST | {"layer_factors": [10**400]}),
    "layer_factors is empty": json.dumps(LIST | {"layer_factors": []}),
    "layer_factors is dict, not a list": json.dumps(LIST | {"layer_factors": {}}),
    "layer_factors[0] is None, not a number": json.dumps(LIST | {"layer_factors": [None]}),
    f"holds {'9' * 40}, too large for a number": json.dumps(LIST).replace("0.9", "9" * 5000),
    "holds the key 'version' twice": '{"format": "lrope-curve", "version": 1, "version": 1}',
    "holds the key 'a' twice": '{"format": "lrope-curve", "version": 1, "provenance": {"a": 1, "a": 2}}',
    "nested deeper than 32 levels": '{"provenance": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "holds more than 65536 lists and objects": json.dumps(LIST | {"provenance": [[]] * 70_000}),
    "is larger than 1 MiB": json.dumps(LIST | {"provenance": "x" * (1 << 20)}),
    "architecture is 3, not a string": json.dumps(LIST | {"architecture": 3}),
    "block_count is 0": json.dumps(LIST | {"block_count": 0}),
    "block_count is True": json.dumps(LIST | {"block_count": True}),
    "block_count is 3.0": json.dumps(LIST | {"block_count": 3.0}),
    "layer_factors[1] is 1.1, but control_points give 2": json.dumps(
        LIST | {"control_points": [[0, 1], [1, 3]], "layer_factors": [1, 1.1, 3]}
    ),
    "bounds are reversed": json.dumps(GOOD | {"bounds": [2, 1]}),
    "the query scale of head 1 in layer 2 is 16.5, beyond 1/16 to 16; ": json.dumps(
        SCALES | {"query_scales": [[1], [], [1, 16.5]]}
    ),
    "the query scale of head 0 in layer 0 is 0.06, beyond": json.dumps(SCALES | {"query_scales": [[0.06]]}),
    "the query scale of head 0 in layer 0 is zero": json.dumps(SCALES | {"query_scales": [[0]]}),
    "the query scale of head 0 in layer 1 is None, not a number": json.dumps(SCALES | {"query_scales": [[1], [None]]}),
    "the factor of KV head 0 in layer 0 is 1025, beyond 1/1024 to 1024; ": json.dumps(
        LIST | {"head_factors": [[1025]]}
    ),
    "the factor of KV head 1 in layer 0 is negative (-1); ": json.dumps(LIST | {"head_factors": [[1, -1]]}),
    "head_factors of layer 1 is int, not a list": json.dumps(LIST | {"head_factors": [[1], 1]}),
    "query_scales is dict, not a list": json.dumps(LIST | {"query_scales": {}}),
    "query_scales has no numbers": json.dumps(LIST | {"query_scales": [[], []]}),
    "head_factors has no numbers": json.dumps(LIST | {"head_factors": []}),
    "holds Infinity": json.dumps(SCALES).replace("0.7", "Infinity"),
}


@pytest.mark.parametrize("message", BAD_DOCUMENTS)
def test_bad_documents(message: str) -> None:
    with pytest.raises(LropeError) as caught:
        CurveFile.loads(BAD_DOCUMENTS[message], "best.json")
    assert str(caught.value).startswith("best.json: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_open_strings_full_of_quotes_take_no_time() -> None:
    with pytest.raises(LropeError, match="is not JSON"):
        CurveFile.loads('"' + '\\"' * 400_000, "x")


def test_brackets_in_strings_are_no_depth() -> None:
    document = LIST | {"provenance": "[{" * 100 + '"]\\'}
    assert CurveFile.loads(json.dumps(document), "x").provenance == document["provenance"]


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_loading_anything_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "anything.json"
    path.write_bytes(data)
    with pytest.raises(LropeError):
        CurveFile.load(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def rows(most: float) -> st.SearchStrategy[tuple[tuple[float, ...], ...] | None]:
    row = st.lists(st.floats(1 / most, most), max_size=5).map(tuple)
    return st.none() | st.lists(row, min_size=1, max_size=4).filter(any).map(tuple)


@given(
    st.none() | control_points(),
    rows(1024),
    rows(16),
    st.none() | st.text(),
    st.none() | st.integers(1, 200),
    json_values,
    st.dictionaries(st.text().map(lambda key: "x-" + key), json_values, max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_documents_round_trip_and_fit_the_schema(
    points: tuple[tuple[float, float], ...] | None,
    head_factors: tuple[tuple[float, ...], ...] | None,
    query_scales: tuple[tuple[float, ...], ...] | None,
    architecture: str | None,
    block_count: int | None,
    provenance: object,
    extra: dict[str, object],
    with_factors: bool,
    compact: bool,
) -> None:
    assume(points or head_factors or query_scales)
    factors = tuple(Curve(points).factors(7).tolist()) if with_factors and points else None
    heads: dict[str, Any] = {"head_factors": head_factors, "query_scales": query_scales}
    document = CurveFile(points, factors, architecture, block_count, provenance, extra=extra, **heads)
    text = document.dumps(compact)
    assert CurveFile.loads(text, "x") == document
    assert ("\n" in text) is not compact
    jsonschema.validate(json.loads(text), SCHEMA)


SCHEMA_SEES = [
    GOOD | {"version": 2},
    GOOD | {"format": "other"},
    {"format": "lrope-curve", "version": 1},
    LIST | {"layer_factors": []},
    LIST | {"layer_factors": [1, 0]},
    LIST | {"layer_factors": [1, -2]},
    LIST | {"block_count": 0},
    LIST | {"architecture": 3},
    GOOD | {"control_points": [[0, 1]]},
    GOOD | {"control_points": [[0, 1], [1, 0]]},
    GOOD | {"control_points": [[0, 1], [1, 1, 1]]},
    GOOD | {"control_points": [[0.1, 1], [1, 1]]},
    GOOD | {"control_points": [[0, 1], [2, 1]]},
    GOOD | {"bounds": [1]},
    LIST | {"head_factors": [[1, 1025]]},
    LIST | {"head_factors": [[]]},
    LIST | {"query_scales": [[1], [0.06]]},
    LIST | {"query_scales": [[17]]},
    LIST | {"query_scales": [1]},
    LIST | {"query_scales": []},
]


@pytest.mark.parametrize("document", SCHEMA_SEES, ids=str)
def test_schema_and_loader_refuse_alike(document: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)
    with pytest.raises(LropeError):
        CurveFile.loads(json.dumps(document), "x")


SCHEMA_TAKES = [
    SCALES, SCALES | {"head_factors": [[1 / 1024], [], [1024]]}, GOOD, LIST,
    GOOD | {"bounds": [0.1, 9]}, LIST | {"new": [1]}, LIST | {"architecture": None, "block_count": None}
]  # fmt: skip


@pytest.mark.parametrize("document", SCHEMA_TAKES, ids=str)
def test_schema_and_loader_accept_alike(document: dict[str, object]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(document, SCHEMA)
    loaded = CurveFile.loads(json.dumps(document), "x")
    assert json.loads(loaded.dumps()) == {"bounds": [0.5, 4.0], **document} if "control_points" in document else True
    assert loaded.extra == ({"new": [1]} if "new" in document else {})


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    document = CurveFile(layer_factors=(1, 1.25), provenance={"task": "kv"})
    document.save(path)
    assert CurveFile.load(path) == document
    for name, content, message in [
        ("missing.json", None, "no such file"),
        ("latin1.json", "Bézier".encode("latin1"), "is not UTF-8 text"),
        ("big.json", b"[" + b" " * (1 << 20) + b"]", "is larger than 1 MiB"),
        ("big.bin", b"\xff" * (2 << 20), "is larger than 1 MiB"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(LropeError, match=message):
            CurveFile.load(tmp_path / name)
    with pytest.raises(LropeError, match="is a folder"):
        CurveFile.load(tmp_path)


def test_provenance_must_be_json() -> None:
    for value in (math.nan, object(), {1, 2}):
        with pytest.raises(LropeError, match="cannot be stored as JSON"):
            CurveFile(layer_factors=(1.0,), provenance=value).dumps()


@given(st.integers(1, 30), st.integers(1, 30))
def test_factors_for(n: int, other: int) -> None:
    assume(n != other)
    listed = CurveFile(layer_factors=tuple(1 + i / 100 for i in range(n)))
    assert listed.factors_for(n) == listed.layer_factors
    with pytest.raises(LropeError, match=f"{n} layer_factors, but the model has {other} layers"):
        listed.factors_for(other)
    curve = CurveFile(control_points=((0, 1), (1, 1)), layer_factors=(1.0,) * n)
    assert curve.factors_for(other) == (1.0,) * other


HEIGHTS = st.lists(st.floats(0.5, 4), min_size=2, max_size=8)


@st.composite
def well_conditioned(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Control points whose x are apart, so that dy/dx is bounded."""
    heights = draw(HEIGHTS)
    steps = np.array([draw(st.floats(0.5, 1.5)) for _ in heights[1:]])
    xs = np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
    xs[-1] = 1.0
    return xs.tolist(), heights


@given(HEIGHTS, st.floats(0, 1))
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
    array = curve.factors(n_layer)
    assert factors == array.tolist() and array.shape == (n_layer,) and array.dtype == np.float64
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
