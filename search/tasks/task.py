"""What a task is, and the parts that every task has."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..types import Context

SPLITS = ("search", "validation", "test")
DEFAULT_DEPTHS = 11


class Task(Protocol):
    """A source of contexts; the same settings and seed always give the same ones."""

    @property
    def name(self) -> str:
        """Short name, as on the command line."""
        ...

    def size(self, split: str) -> int | None:
        """Return how many contexts ``split`` has, None if as many as wanted."""
        ...

    def context(self, split: str, index: int) -> Context:
        """Return context ``index`` (from 0) of ``split``; no context stands in two splits."""
        ...

    def calibration(self) -> Context:
        """Return a short, easy context that shows how a model words its answers.

        Nothing in it stands in a validation or test context.
        """
        ...


def even_depths(n: int) -> list[float]:
    """Return ``n`` evenly spaced depths from 0 to 1; only 0 for one."""
    return [float(depth) for depth in np.linspace(0.0, 1.0, n)]
