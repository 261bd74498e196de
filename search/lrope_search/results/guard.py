"""How far a curve moves the model on ordinary text."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..scores import ContextScore


def divergences_by_length(scores: Iterable[ContextScore]) -> dict[str, float]:
    """Return the mean KL divergence of guard scores, nats per token, on ``short`` and on ``long`` texts.

    Probes at depth 0 are of short texts, at depth 1 of long ones; a probe's log-probability is minus its divergence.
    ``inf`` where one is not finite; a length without probes is left out.
    """
    values: dict[str, list[float]] = {}
    for score in scores:
        for probe in score.probes:
            values.setdefault("long" if probe.depth > 0.5 else "short", []).append(-probe.log_probability)
    return {name: math.fsum(of) / len(of) if all(map(math.isfinite, of)) else math.inf for name, of in values.items()}
