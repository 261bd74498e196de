"""Sets what a candidate changes in a loaded model: factors of layers, and what heads have of their own."""

from __future__ import annotations

from pathlib import Path

from lrope_gguf.curve import ROWS
from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import read_model

from ..scores import Factors, rows_of
from .model import Model


class Tuner:
    """Sets factors in a model, whatever its file holds. ``path``: that file.

    Raises:
        LropeError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._neutral = {name: tuple((1.0,) * len(row) for row in rows) for name, rows in read_model(path).rows.items()}
        self._used: set[str] = set()

    def __call__(self, model: Model, factors: Factors) -> None:
        """Let ``model`` compute with ``factors``. The memory must be empty: keys are cached rotated.

        Raises:
            FactorsRefusedError: see `Model.set_factors`.
            LropeError: see there; the library cannot set what heads have of their own, or refuses it.
        """
        model.set_factors(tuple(factors))
        of_heads = self._neutral | rows_of(factors)
        for name in ROWS:
            if name in of_heads or name in self._used:
                set_rows = getattr(model, f"set_{name}", None)
                if set_rows is None:
                    raise LropeError(
                        f"{name}: this llama.cpp library cannot set them; use one with all of lrope-gguf's patches"
                    )
                set_rows(of_heads.get(name))
                self._used.add(name)
