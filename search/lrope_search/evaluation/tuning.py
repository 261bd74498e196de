"""Sets what a candidate changes in a loaded model: factors of layers, and what heads have of their own."""

from __future__ import annotations

from pathlib import Path

from lrope_gguf.model_info import read_model

from ..scores import Factors, rows_of
from .model import Model


class Tuner:
    """Sets factors in a model, whatever its file holds. ``path``: that file.

    Raises:
        LropeError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        own = read_model(path).query_scales
        self._plain = None if own is None else tuple((1.0,) * len(row) for row in own)
        self._scaled = own is not None

    def __call__(self, model: Model, factors: Factors) -> None:
        """Let ``model`` compute with ``factors``. The memory must be empty: keys are cached rotated.

        Raises:
            FactorsRefusedError: see `Model.set_factors`.
            LropeError: see there; the library cannot set what heads have of their own.
        """
        rows = rows_of(factors)
        if "head_factors" in rows:
            model.set_head_factors(rows["head_factors"])  # in place of the layers', as these take theirs
        else:
            model.set_factors(tuple(factors))
        scales = rows.get("query_scales", self._plain)
        if scales is not None or self._scaled:
            model.set_query_scales(scales)
            self._scaled = True
