"""Layer factors as a Bézier curve over the layers, and the file that holds one, and what heads have of their own.

Layer `l` of `L` stands at `x = l / (L - 1)`; its factor is the curve's `y` there. With `x_0 = 0`, `x_n = 1` and `x`
non-decreasing, `dx/dt = n * sum (x_{i+1} - x_i) B_{i,n-1}(t)` is positive inside (0, 1), so that each x has one t.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lrope_gguf.errors import LropeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Point = tuple[float, float]
Number = TypeVar("Number", bound=Any)
"""A float, or float64 arrays whose shapes broadcast."""
Rows = tuple[tuple[float, ...], ...]
"""A number a head, a row a layer; a layer without heads has an empty row."""

FORMAT = "lrope-curve"
VERSION = 1
DEFAULT_BOUNDS = (0.5, 4.0)
MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_CONTAINERS = 1 << 16
MAX_POINTS = 64
MAX_FACTOR = 1024
"""The largest factor of a layer or head, and 1 over the smallest: LLAMA_ROPE_LAYER_FACTOR_MAX of the patch."""
ROWS = {"head_factors": MAX_FACTOR, "query_scales": 16}
"""What a model may have for each of its KV heads or heads, and the largest number of it; the smallest is 1 over it."""
_OF_A_HEAD = {"head_factors": "factor of KV head", "query_scales": "query scale of head"}
_BISECTIONS = 54  # t is then as near as float64 can tell
_LIGHT = 1 << 14  # control points, squared, times layers: about 0.05 s without NumPy, which takes longer to load
AGREEMENT = 1e-5
"""How far `layer_factors` may lie from the curve of `control_points` in the same file."""


# Floats and NumPy arrays alike, so that a small curve needs no NumPy.


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


def _number(value: Any, what: str) -> float:
    """`value` as a finite float; true and false are no numbers."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise LropeError(f"{what} is {value!r}, not a number; give a number") from None
    except OverflowError:
        number = math.inf
    if math.isnan(number):
        raise LropeError(f"{what} is NaN; give a number")
    if math.isinf(number):
        raise LropeError(f"{what} is infinite; give a finite number")
    return number


def positive(value: Any, what: str) -> float:
    """`value` as a finite float above 0. Raises `LropeError`: it is not one; says in which way."""
    number = _number(value, what)
    if number == 0:
        raise LropeError(f"{what} is zero; give a factor above 0 (1 changes nothing)")
    if number < 0:
        raise LropeError(f"{what} is negative ({number:g}); give a factor above 0 (1 changes nothing)")
    return number


def _sequence(value: Any, what: str) -> list[Any]:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise LropeError(f"{what} is {type(value).__name__}, not a list; give a list")
    return list(value)


def head_rows(value: Any, name: str) -> Rows:
    """`value` as rows of `ROWS[name]`. Raises `LropeError`: it is no list of lists of numbers within the limits."""
    most, rows = ROWS[name], []
    for layer, row in enumerate(_sequence(value, name)):
        numbers = []
        for head, number in enumerate(_sequence(row, f"{name} of layer {layer}")):
            what = f"the {_OF_A_HEAD[name]} {head} in layer {layer}"
            numbers.append(positive(number, what))
            if not 1 / most <= numbers[-1] <= most:
                raise LropeError(f"{what} is {numbers[-1]:g}, beyond 1/{most} to {most}; give one in that range")
        rows.append(tuple(numbers))
    if not any(rows):
        raise LropeError(f"{name} has no numbers; give a list a layer, with a number a head")
    return tuple(rows)


def _bounds(value: Any) -> tuple[float, float]:
    bounds = _sequence(value, "bounds")
    if len(bounds) != 2:
        raise LropeError(f"bounds has {len(bounds)} values; give [lowest, highest]")
    low, high = (positive(bound, f"bounds[{i}]") for i, bound in enumerate(bounds))
    if low > high:
        raise LropeError(f"bounds are reversed ({low:g} above {high:g}); give [lowest, highest]")
    return low, high


def _control_points(value: Any, bounds: tuple[float, float]) -> tuple[Point, ...]:
    points: list[Point] = []
    for i, pair in enumerate(_sequence(value, "control_points")):
        xy = _sequence(pair, f"control_points[{i}]")
        if len(xy) != 2:
            raise LropeError(f"control_points[{i}] has {len(xy)} values; give [x, y]")
        points.append((_number(xy[0], f"x of control_points[{i}]"), positive(xy[1], f"y of control_points[{i}]")))
    if not 2 <= len(points) <= MAX_POINTS:
        raise LropeError(f"control_points has {len(points)} points; give 2 to {MAX_POINTS}")
    if points[0][0] != 0:
        raise LropeError(f"control_points begins at x = {points[0][0]!r}; the first x must be 0 (the first layer)")
    if points[-1][0] != 1:
        raise LropeError(f"control_points ends at x = {points[-1][0]!r}; the last x must be 1 (the last layer)")
    for i in range(1, len(points)):
        if points[i][0] < points[i - 1][0]:
            raise LropeError(
                f"control_points[{i}] goes back from x = {points[i - 1][0]:g} to {points[i][0]:g}; x must not decrease"
            )
    for i, (_, y) in enumerate(points):
        if not bounds[0] <= y <= bounds[1]:
            raise LropeError(
                f"y of control_points[{i}] is {y:g}, outside the bounds {bounds[0]:g} to {bounds[1]:g}; "
                "change it or the bounds"
            )
    return tuple(points)


@dataclass(frozen=True)
class Curve:
    """A Bézier curve of degree `len(control_points) - 1` that gives each layer its factor.

    Args:
        control_points: `(x, y)` pairs, x from 0 to 1 and non-decreasing, y within `bounds`.
        bounds: lowest and highest y. A Bézier curve lies in its control points' hull, so the factors keep them too.

    Raises:
        LropeError: where a point breaks these rules.
    """

    control_points: tuple[Point, ...]
    bounds: tuple[float, float] = DEFAULT_BOUNDS

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", _bounds(self.bounds))
        object.__setattr__(self, "control_points", _control_points(self.control_points, self.bounds))

    def factors(self, n_layer: int) -> NDArray[np.float64]:
        """The factors of layers 0 to `n_layer - 1`, float64, shape `(n_layer,)`; one layer stands at x = 0."""
        import numpy as np

        xs, ys = zip(*self.control_points, strict=True)
        x = np.array(self._positions(n_layer))
        # the hull bounds the exact curve; rounding must not step out of it
        factors: NDArray[np.float64] = np.clip(height(xs, ys, x), min(ys), max(ys))
        return factors

    def factor_list(self, n_layer: int) -> list[float]:
        """The same as floats; NumPy is loaded only where the curve is so large that it pays."""
        if len(self.control_points) ** 2 * n_layer > _LIGHT:
            return list(map(float, self.factors(n_layer)))
        xs, ys = zip(*self.control_points, strict=True)
        return [min(max(height(xs, ys, x), min(ys)), max(ys)) for x in self._positions(n_layer)]

    def _positions(self, n_layer: int) -> list[float]:
        if n_layer < 1:
            raise LropeError(f"a curve needs at least one layer, not {n_layer}")
        return layer_positions(n_layer)


@dataclass(frozen=True)
class CurveFile:
    """The document of a curve file (`best.json`): a curve or a list of factors, numbers of heads, and their origin.

    Attributes:
        control_points: fit any number of layers; None where only `layer_factors` are given.
        layer_factors: one factor per layer, for exactly that many layers.
        bounds: bounds of the curve's y.
        architecture: `general.architecture` of the model that it was made for.
        block_count: that model's number of layers.
        provenance: free JSON: task, scores, seed, versions, the model's fingerprint.
        extra: keys that this version does not know, kept as they are.
        head_factors: one factor per KV head, a row a layer; they go before those of the layers.
        query_scales: one factor of the attention logits per head, a row a layer.
    """

    control_points: tuple[Point, ...] | None = None
    layer_factors: tuple[float, ...] | None = None
    architecture: str | None = None
    block_count: int | None = None
    provenance: Any = None
    bounds: tuple[float, float] = DEFAULT_BOUNDS
    extra: dict[str, Any] = field(default_factory=dict)
    head_factors: Rows | None = None
    query_scales: Rows | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in ("control_points", "layer_factors", *ROWS)):
            raise LropeError(
                "it has neither control_points nor layer_factors, head_factors or query_scales; give one of them"
            )
        for name in ROWS:
            if (rows := getattr(self, name)) is not None:
                object.__setattr__(self, name, head_rows(rows, name))
        object.__setattr__(self, "bounds", _bounds(self.bounds))
        if self.control_points is not None:
            object.__setattr__(self, "control_points", _control_points(self.control_points, self.bounds))
        if self.layer_factors is not None:
            values = _sequence(self.layer_factors, "layer_factors")
            if not values:
                raise LropeError("layer_factors is empty; give one factor per layer")
            factors = tuple(positive(value, f"layer_factors[{i}]") for i, value in enumerate(values))
            object.__setattr__(self, "layer_factors", factors)
        if self.architecture is not None and not isinstance(self.architecture, str):
            raise LropeError(f"architecture is {self.architecture!r}, not a string; give a name")
        n = self.block_count
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise LropeError(f"block_count is {n!r}; give a whole number above 0")

    @property
    def curve(self) -> Curve | None:
        """The curve of `control_points`."""
        return None if self.control_points is None else Curve(self.control_points, self.bounds)

    @property
    def rows(self) -> dict[str, Rows]:
        """Those of `ROWS` that it has."""
        return {name: rows for name in ROWS if (rows := getattr(self, name)) is not None}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CurveFile:
        """Read a curve file, or what else gives such a document once, such as a pipe; ``-`` is the standard input.

        Raises `LropeError`: where it is missing, unreadable, above 1 MiB, or not a valid document.
        """
        data = _read(path)
        path = source_name(path)
        try:
            text = data.decode("utf-8-sig")  # editors on Windows begin a file with a byte order mark
        except UnicodeDecodeError as error:
            if len(data) > MAX_BYTES:
                text = " " * len(data)  # its size says more than where the cut fell
            else:
                raise LropeError(f"{path}: is not UTF-8 text (byte {error.start}); give a curve file") from None
        return cls.loads(text, str(path))

    @classmethod
    def loads(cls, text: str, name: str, *, check_agreement: bool = True) -> CurveFile:
        """Parse a curve document; `name` stands for it in messages.

        `check_agreement=False` skips the comparison of `layer_factors` with `control_points`. Raises `LropeError`:
        where it is not a valid document.
        """
        try:
            document = _parse(text)
            if not isinstance(document, dict):
                raise LropeError("is not a JSON object; give a curve file")
            if document.pop("format", None) != FORMAT:
                raise LropeError(f'its "format" is not "{FORMAT}"; give a curve file')
            version = document.pop("version", None)
            if version != VERSION or isinstance(version, bool):
                raise LropeError(f"its version is {version!r}, this program reads {VERSION}; upgrade lrope-gguf")
            names = ("control_points", "layer_factors", *ROWS, "architecture", "block_count", "provenance", "bounds")
            known = {name: document.pop(name) for name in names if name in document}
            if known.get("bounds", ...) is None:
                del known["bounds"]
            result = cls(**known, extra=document)
            if check_agreement:
                result.check_agreement()
        except LropeError as error:
            raise LropeError(f"{name}: {error}") from None
        return result

    def check_agreement(self) -> None:
        """Raise `LropeError` where `layer_factors` and the curve of `control_points` differ by more than 1e-5."""
        curve = self.curve
        if curve is None or self.layer_factors is None:
            return
        made_all = curve.factor_list(len(self.layer_factors))
        for layer, (given, made) in enumerate(zip(self.layer_factors, made_all, strict=True)):
            if abs(given - made) > AGREEMENT:
                raise LropeError(
                    f"layer_factors[{layer}] is {given:g}, but control_points give {made:g}; remove one of the two"
                )

    def document(self) -> dict[str, Any]:
        """The document as what JSON is made of."""
        document: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        if self.control_points is not None:
            document["control_points"] = self.control_points
            document["bounds"] = self.bounds
        for name in ("layer_factors", *ROWS, "architecture", "block_count", "provenance"):
            if getattr(self, name) is not None:
                document[name] = getattr(self, name)
        return document | self.extra

    def dumps(self, compact: bool = False) -> str:
        """The document as JSON, on one line or indented (then with a newline at the end)."""
        document = self.document()
        try:
            if compact:
                return json.dumps(document, allow_nan=False, separators=(",", ":"))
            return json.dumps(document, allow_nan=False, indent=2) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise LropeError(f"the curve cannot be stored as JSON ({error}); check its provenance") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the document to `path`, whole or not at all."""
        from lrope_gguf.files import atomic_write_text

        atomic_write_text(path, self.dumps())

    def factors_for(self, n_layer: int) -> tuple[float, ...]:
        """The factors of `n_layer` layers: the listed ones, else the curve's. Raises `LropeError`: it has neither."""
        if self.layer_factors is not None and len(self.layer_factors) == n_layer:
            return self.layer_factors
        curve = self.curve
        if curve is None:
            raise LropeError(
                f"it has {len(self.layer_factors or ())} layer_factors, but the model has {n_layer} layers"
            )
        return tuple(curve.factor_list(n_layer))


def published() -> dict[str, Path]:
    """The curve files that come with this package, by name."""
    here = Path(__file__)
    folders = (here.with_name("curves"), here.parent.parent / "curves")  # installed, or in a checkout
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def resolved(path: str | Path) -> str | Path:
    """The curve file that is meant, by its path or a `published` name. Raises `LropeError`: there is neither."""
    name = os.fspath(path)
    if name == "-" or Path(name).exists() or Path(name).name != name or Path(name).suffix == ".json":
        return path
    known = published()
    if name not in known:
        raise LropeError(f"{path}: no such file or curve; the curves of lrope-gguf are {', '.join(known) or 'none'}")
    return known[name]


def source_name(path: str | os.PathLike[str]) -> str:
    """What messages call the place that `CurveFile.load` reads."""
    return "standard input" if os.fspath(path) == "-" else str(path)


def _read(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a curve file, read once; one more than it may have where it has more."""
    try:
        if os.fspath(path) == "-":
            file: Any = open(0, "rb", closefd=False)  # noqa: SIM115
        elif Path(path).is_dir():
            raise LropeError(f"{path}: is a folder; give a file")
        else:
            file = Path(path).open("rb")  # noqa: SIM115
        with file:
            data: bytes = file.read(MAX_BYTES + 1)
            return data
    except FileNotFoundError as error:
        raise LropeError(f"{path}: no such file; check the name") from error
    except OSError as error:
        raise LropeError(f"{source_name(path)}: cannot be read ({error.strerror}); check its permissions") from error


def _parse(text: str) -> Any:
    """Strict JSON of bounded size, depth and memory: no NaN, infinities, overflowing numbers or repeated keys."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise LropeError("is larger than 1 MiB; give a curve file")
    depth = containers = 0
    # The closing quote is optional, so that an open string is passed over once and not tried from every quote in it.
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"?|[][{}]', text, re.DOTALL):
        opens = match[0] in "[{"
        depth += opens - (match[0] in "]}")
        containers += opens
        if depth > MAX_DEPTH:
            raise LropeError(f"is nested deeper than {MAX_DEPTH} levels; give a curve file")
        if containers > MAX_CONTAINERS:  # each takes up to 50 times its text in memory
            raise LropeError(f"holds more than {MAX_CONTAINERS} lists and objects; give a curve file")

    def constant(word: str) -> Any:
        raise LropeError(f"holds {word}; give finite numbers")

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise LropeError(f"holds {digits[:40]}, too large for a number; give a smaller one")
        return value

    def whole(digits: str) -> int:
        number(digits)
        return int(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise LropeError(f"holds the key {key[:80]!r} twice; keep one of them")
            result[key] = value
        return result

    try:
        result = json.loads(
            text, parse_constant=constant, parse_float=number, parse_int=whole, object_pairs_hook=unique
        )
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(result, ensure_ascii=False).encode()
        return result
    except json.JSONDecodeError as error:
        raise LropeError(f"is not JSON ({error.msg}, line {error.lineno} column {error.colno})") from None
    except UnicodeEncodeError:
        raise LropeError("holds half of a surrogate pair; write the whole character") from None
