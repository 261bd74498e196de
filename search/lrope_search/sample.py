"""How many questions a search asks, in how many contexts: the cheapest sample that sees a gain worth finding.

What decides is how candidate minus base varies over the questions of a context and between contexts:
research/sample.md has the measurements behind the constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SPLITS = ("search", "validation", "test")
"""To compare candidates, to choose the winner, to measure it."""

SPREAD = 2.9
"""Standard deviation of candidate minus base over the questions of a context, in units of a gain worth finding."""
ERRORS: Mapping[str, float] = MappingProxyType({"search": 0.4, "validation": 0.2, "test": 0.14})
"""Wanted standard error of a candidate's gain on each split, in the same units."""
_LEAST: Mapping[str, int] = MappingProxyType({"search": 1, "validation": 2, "test": 8})
# a bootstrap over fewer contexts than eight means little


@dataclass(frozen=True)
class Components:
    """Variance of candidate minus base, in nats² (or any unit): of a question within its context, and between contexts.

    ``between`` is None where only one context was seen.
    """

    within: float
    between: float | None

    def standard_error(self, contexts: int, probes: int) -> float:
        """Return that of the mean over ``contexts`` of ``probes`` questions each."""
        return math.sqrt(((self.between or 0.0) + self.within / probes) / contexts)


def cheapest(
    components: Components, error: float, *, places: int, context_cost: float, probe_cost: float, least: int = 1
) -> tuple[int, int]:
    """Return how many contexts and how many probes a context give a standard error of ``error`` at the least cost.

    Raises `ValueError`: ``error`` or ``places`` is not positive.

    Args:
        components: How candidate minus base varies.
        error: The standard error wanted.
        places: The most probes that a context has room for.
        context_cost: Of a context without its probes, in tokens.
        probe_cost: Of one probe, in tokens.
        least: The fewest contexts.
    """
    if error <= 0.0 or places < 1:
        raise ValueError(f"a standard error of {error} with {places} places")

    def contexts(probes: int) -> int:
        needed = ((components.between or 0.0) + components.within / probes) / error**2
        return max(least, math.ceil(needed - 1e-9))

    def cost(probes: int) -> float:
        return contexts(probes) * (context_cost + probes * probe_cost)

    probes = min(range(1, places + 1), key=cost)
    return contexts(probes), probes


_PRIOR = Components(SPREAD**2, 0.0)


def default_probes(places: int) -> int:
    """Return the questions of a search context with so many places; each takes about as many tokens as a place."""
    return cheapest(_PRIOR, ERRORS["search"], places=places, context_cost=places, probe_cost=1.0)[1]


def default_contexts(split: str, probes: int) -> int:
    """Return the contexts of ``split`` if each has so many probes."""
    needed = _PRIOR.within / probes / ERRORS[split] ** 2
    return max(_LEAST[split], math.ceil(needed - 1e-9))
