"""How far a curve moves the model on ordinary text."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..scores import DivergenceScore


def divergences_by_length(scores: Iterable[DivergenceScore]) -> dict[str, float]:
    """Return the mean KL divergence, nats per token, on ``short`` and on ``long`` texts; empty without scores.

    ``inf`` where one is not finite.
    """
    scores = list(scores)
    lengths = {"short": [score.short for score in scores], "long": [score.long for score in scores]}
    return {
        name: math.fsum(of) / len(of) if all(map(math.isfinite, of)) else math.inf for name, of in lengths.items() if of
    }
