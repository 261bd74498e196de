"""A picture of layer factors over the layers, with the curve that they come from and its control polygon."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path

from lrope_gguf.curve import Point
from lrope_gguf.errors import LropeError
from lrope_gguf.files import atomic_write_bytes

SUFFIXES = (".png", ".svg")
_STEPS = 400


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
        factors: one a layer.
        control_points: of the Bézier curve to draw with them, `(x, y)` with x from 0 to 1.
        n_layer: the layers that the curve spans; by default all.
        title: above the picture; control characters are left out.
        curve_label: the curve's name in the legend.

    Raises:
        LropeError: where the name ends otherwise, matplotlib is missing, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise LropeError(f"{path}: give the picture a name that ends in .png or .svg")
    if not Path(path).absolute().parent.is_dir():
        raise LropeError(f"{path}: its directory does not exist; make it first")
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise LropeError(
            f"{path}: drawing needs the Python package matplotlib; pip install 'lrope-gguf[plot]'"
        ) from None

    # text stays text, and the same picture has the same bytes
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lrope"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font does not have
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(1, color="0.6", linewidth=1, linestyle="--", zorder=1)
        layers = range(len(factors))
        if control_points is not None:
            span = max((len(factors) if n_layer is None else n_layer) - 1, 0)
            x, y = _bezier(control_points)
            axes.plot(
                [span * px for px, _ in control_points],
                [py for _, py in control_points],
                color="tab:orange", linewidth=1, linestyle=":", marker="s", markersize=5, label="control points",
                zorder=2, clip_on=False,
            )  # fmt: skip
            axes.plot([span * value for value in x], y, color="tab:orange", linewidth=1.8, label=curve_label, zorder=3)
        axes.plot(
            layers, factors, color="tab:blue", linestyle="none" if control_points is not None else "-", linewidth=0.8,
            marker="o", markersize=5 if len(factors) <= 64 else 2.5, label="stored factors", zorder=4, clip_on=False,
        )  # fmt: skip
        axes.set_xlabel("layer")
        axes.set_ylabel(r"factor $s_l$")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(-0.5, max(len(factors) - 0.5, 0.5))
        values = [1.0, *factors, *(py for _, py in control_points or ())]
        margin = max(0.06 * (max(values) - min(values)), 0.02)
        axes.set_ylim(min(values) - margin, max(values) + margin)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(_title(title), fontsize=11, parse_math=False)
        if control_points is not None:
            axes.legend(frameon=False, fontsize=9)
        picture = BytesIO()
        figure.savefig(picture, format=suffix[1:], dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    atomic_write_bytes(path, picture.getvalue())


def _title(text: str) -> str:
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= 90 else f"{text[:89]}…"


def _bezier(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Points along a Bézier curve, by de Casteljau's construction."""
    xs, ys = [], []
    for step in range(_STEPS + 1):
        t, row = step / _STEPS, list(points)
        while len(row) > 1:
            row = [((1 - t) * a + t * c, (1 - t) * b + t * d) for (a, b), (c, d) in pairwise(row)]
        xs.append(row[0][0])
        ys.append(row[0][1])
    return xs, ys
