"""Pictures: how all of them look, and the one of layer factors with the curve that they come from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrope_gguf.curve import Point, evaluate
from lrope_gguf.errors import LropeError
from lrope_gguf.files import atomic_write_bytes
from lrope_gguf.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
COLOURS = {
    "ink": "#24292f",
    "muted": "#646d76",
    "grid": "#e3e6ea",
    "paper": "#ffffff",
    "base": "#5d6670",
    "uniform": "#0072b2",
    "curve": "#d55e00",
}
"""By what they stand for; blue and vermilion of Okabe and Ito's palette, apart for colour-blind eyes too."""

_STEPS = 400


class PlotUnavailableError(LropeError):
    """Matplotlib is not installed."""


def require_matplotlib(path: str | os.PathLike[str]) -> None:
    """Raise `PlotUnavailableError`, which says how to get it, where matplotlib is missing; `path` is what needs it."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise PlotUnavailableError(
            f"{path}: drawing needs the Python package matplotlib; pip install 'lrope-gguf[plot]'"
        ) from None


@contextmanager
def drawing(name: str = "lrope", *, font_size: float = 10.0) -> Iterator[None]:
    """The look of every picture drawn inside; the same picture has the same bytes.

    Args:
        name: sets the identifiers in an SVG apart from those of pictures with other names.
        font_size: of all text, in points.
    """
    import matplotlib

    style: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": name,
        "font.size": font_size,
        "axes.titlesize": font_size + 1,
        "legend.fontsize": font_size - 1,
        "legend.frameon": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": COLOURS["muted"],
        "axes.facecolor": "none",
        "axes.labelcolor": COLOURS["ink"],
        "figure.facecolor": COLOURS["paper"],
        "grid.color": COLOURS["grid"],
        "text.color": COLOURS["ink"],
        "xtick.color": COLOURS["muted"],
        "ytick.color": COLOURS["muted"],
        "xtick.labelcolor": COLOURS["ink"],
        "ytick.labelcolor": COLOURS["ink"],
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font does not have
        yield


def rendered(figure: Figure, kind: str) -> bytes:
    """The bytes of `figure` as ``png`` or ``svg``, the same for the same picture: without a date."""
    picture = BytesIO()
    figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return picture.getvalue()


def picture_kind(path: str | os.PathLike[str]) -> str:
    """``png`` or ``svg``, by the end of a name. Raises `LropeError`: another end, no directory, or no matplotlib."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise LropeError(f"{path}: give the picture a name that ends in .png or .svg")
    if not Path(path).absolute().parent.is_dir():
        raise LropeError(f"{path}: its directory does not exist; make it first")
    require_matplotlib(path)
    return suffix[1:]


@contextmanager
def drawn_into(path: str | os.PathLike[str], size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure of this size in inches, then write it as `picture_kind` says; an existing file is replaced."""
    kind = picture_kind(path)
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        picture = rendered(figure, kind)
    atomic_write_bytes(path, picture)


def plot_factors(
    path: str | os.PathLike[str],
    factors: Sequence[float],
    *,
    control_points: Sequence[Point] | None = None,
    n_layer: int | None = None,
    title: str = "",
    curve_label: str = "curve",
) -> None:
    """Draw the factors into a PNG or SVG file, as the end of its name says; an existing one is replaced.

    Args:
        path: the picture's file.
        factors: one per layer.
        control_points: of the Bézier curve to draw with them, `(x, y)` with x from 0 to 1.
        n_layer: the layers that the curve spans; by default all.
        title: above the picture; control characters are left out.
        curve_label: the curve's name in the legend.

    Raises:
        LropeError: where the name ends otherwise, matplotlib is missing, or the file cannot be written.
    """
    with drawn_into(path, (8, 4.5)) as figure:
        axes = figure.add_subplot()
        draw_factors(axes, factors, control_points=control_points, n_layer=n_layer, curve_label=curve_label)
        axes.set_title(printable(title, 90), parse_math=False)
        if control_points is not None:
            axes.legend()


def draw_factors(
    axes: Axes,
    factors: Sequence[float],
    *,
    control_points: Sequence[Point] | None = None,
    n_layer: int | None = None,
    curve_label: str = "curve",
    factors_label: str = "stored factors",
    also: Sequence[float] = (),
) -> None:
    """Draw factors, and their curve if there is one, into `axes`, which show `also` too; see `plot_factors`."""
    axes.axhline(1, color=COLOURS["base"], linewidth=1, linestyle="--", zorder=1)
    if control_points is not None:
        span = max((len(factors) if n_layer is None else n_layer) - 1, 0)
        x, y = bezier(control_points)
        axes.plot(
            [span * px for px, _ in control_points],
            [py for _, py in control_points],
            color=COLOURS["curve"], linewidth=1, linestyle=":", marker="s", markersize=5, label="control points",
            zorder=2, clip_on=False,
        )  # fmt: skip
        axes.plot([span * value for value in x], y, color=COLOURS["curve"], linewidth=1.8, label=curve_label, zorder=3)
    axes.plot(
        range(len(factors)), factors, color=COLOURS["ink"], linestyle="none" if control_points is not None else "-",
        linewidth=0.8, marker="o", markersize=4 if len(factors) <= 64 else 2.5, label=factors_label, zorder=4,
        clip_on=False,
    )  # fmt: skip
    layer_axis(axes, len(factors))
    axes.set_ylabel("factor")
    values = [1.0, *factors, *also, *(py for _, py in control_points or ())]
    margin = max(0.06 * (max(values) - min(values)), 0.02)
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.ticklabel_format(axis="y", useOffset=False)


def layer_axis(axes: Axes, n_layer: int) -> None:
    """Make the horizontal axis that of `n_layer` layers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(-0.5, max(n_layer - 0.5, 0.5))


def bezier(points: Sequence[Point], steps: int = _STEPS) -> tuple[list[float], list[float]]:
    """`steps + 1` points along a Bézier curve, evenly spaced in its parameter: their x and their y."""
    xs, ys = zip(*points, strict=True)
    ts = [step / steps for step in range(steps + 1)]
    return [evaluate(xs, t) for t in ts], [evaluate(ys, t) for t in ts]
