"""Two goals at once: gain on the task against KL divergence from the base model on ordinary text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..scores import DivergenceScore, Factors
from .intervals import finite


@dataclass(frozen=True)
class FrontPoint:
    """A candidate of which both are known.

    ``gain``: fitness on validation contexts, nats per answer token over the base model. ``short``, ``long``: KL
    divergence on ordinary text of either length, nats per token.
    """

    factors: Factors
    gain: float
    short: float
    long: float

    @property
    def kl(self) -> float:
        """The larger of the two, which the limit is for."""
        return max(self.short, self.long)


@dataclass(frozen=True)
class Front:
    """Candidates with gain and KL, and the limit of the latter (``--max-kl``).

    The front are those that no other one, nor the base model with no gain at no KL, equals in both (Pareto).
    """

    points: tuple[FrontPoint, ...]
    limit: float

    @classmethod
    def of(cls, points: Iterable[FrontPoint], limit: float) -> Front:
        """Return the front of ``points``, which come by KL, then the better first."""
        return cls(tuple(sorted(points, key=lambda point: (point.kl, -point.gain))), limit)

    @classmethod
    def of_scores(
        cls, gains: Mapping[Factors, float], divergences: Mapping[Factors, Sequence[DivergenceScore]], limit: float
    ) -> Front:
        """Return the front of all that have a gain; where ordinary text was not looked at, no KL and no limit count."""
        if gains and not any(divergences.values()):
            return cls.of((FrontPoint(factors, gain, 0.0, 0.0) for factors, gain in gains.items()), math.inf)
        points = (FrontPoint(f, gain, **divergences_by_length(divergences[f])) for f, gain in gains.items())
        return cls.of(points, limit)

    @property
    def best(self) -> tuple[FrontPoint, ...]:
        """Those on the front, from the least KL and gain to the most."""
        best: list[FrontPoint] = []
        for point in self.points:
            if point.gain > (best[-1].gain if best else 0.0) and finite(point.kl) is not None:
                best.append(point)
        return tuple(best)

    @property
    def choice(self) -> FrontPoint | None:
        """The one with the most gain on the front within the limit; None if there is none."""
        return max((point for point in self.best if point.kl <= self.limit), key=lambda p: p.gain, default=None)

    @property
    def passed_over(self) -> tuple[FrontPoint, ...]:
        """Those that gain more than the choice, but have a KL above the limit; the best first."""
        least = 0.0 if self.choice is None else self.choice.gain
        over = [point for point in self.points if point.gain > least and not point.kl <= self.limit]
        return tuple(sorted(over, key=lambda point: -point.gain))

    def json(self, chosen: Factors | None = None) -> list[dict[str, Any]]:
        """Return the points without their factors, finite numbers only; ``chosen``: whose; None: those of `choice`."""
        best, choice = self.best, self.choice
        chosen = choice.factors if chosen is None and choice is not None else chosen
        return [
            {
                "gain": finite(point.gain),
                "short": finite(point.short),
                "long": finite(point.long),
                "front": point in best,
                "chosen": point.factors == chosen,
            }
            for point in self.points
        ]


def divergences_by_length(scores: Iterable[DivergenceScore]) -> dict[str, float]:
    """Return the mean KL, nats a token, of ``short`` and ``long`` texts; inf where one is not finite; empty of none."""
    scores = list(scores)
    lengths = {"short": [score.short for score in scores], "long": [score.long for score in scores]}
    return {
        name: math.fsum(of) / len(of) if all(map(math.isfinite, of)) else math.inf for name, of in lengths.items() if of
    }
