"""Curve files as factors that are evaluated."""

from __future__ import annotations

from pathlib import Path

from lrope_gguf.commands.write import curve_for
from lrope_gguf.model_info import ModelInfo

from ..scores import Factors, tuned


def factors_of_curve(path: str | Path, info: ModelInfo) -> Factors:
    """Return the factors of a curve file for a model, 1 for layers that it leaves out, with what its heads have.

    Raises:
        LropeError: the file is not valid or made for another model.
    """
    document, of_layers = curve_for(path, info)
    return tuned(of_layers or (1.0,) * (info.n_layer or 0), document.rows)
