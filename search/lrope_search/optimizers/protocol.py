"""The interface of optimizers: candidates are asked for, evaluated elsewhere, and told with their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from lrope_gguf.curve import Curve, Point

from ..scores import Factors

Score: TypeAlias = tuple[int, float]
"""``(contexts seen, fitness)``: higher is better, compared as a tuple; a fitness of ``-inf`` is a useless candidate."""


@dataclass(frozen=True)
class Candidate:
    """Factors to evaluate: ``id`` counts from 0 in the order of asking, ``origin`` tells how they came about.

    ``curve``: what makes them; None if no curve does.
    """

    id: int
    curve: Curve | None
    factors: Factors
    origin: str

    @property
    def control_points(self) -> tuple[Point, ...] | None:
        """Those of the curve, if there is one."""
        return None if self.curve is None else self.curve.control_points


def rank(item: tuple[Candidate, Score]) -> tuple[int, float, int]:
    """Sort key that puts the best first and, among equals, the oldest."""
    candidate, (contexts, fitness) = item
    return -contexts, -fitness, candidate.id


class Optimizer(Protocol):
    """What the search needs of an optimizer. All of them maximise.

    Steady state: there are no generations to wait for. Candidate ``k`` is asked for as soon as all ids up to
    ``k - lag`` were told and before any later one is, so that the sequence of asks and tells, and with it every
    candidate, is the same whatever result comes first. If `ask` returns None, the next id is told and `ask` tried
    again; a generational algorithm returns None until its generation is complete.
    """

    @property
    def lag(self) -> int:
        """How far asking may run ahead of telling: candidates asked for and not yet told, at most."""

    def ask(self) -> Candidate | None:
        """Return the next candidate, whose factors no earlier one had.

        None, and no change of state, if more must be told first or nothing new is to be had (`should_stop`).
        """

    def tell(self, candidate: Candidate, score: Score) -> None:
        """Take the score of a candidate; candidates are told one by one in the order of their ids.

        Raises `ValueError`: a candidate that is not the next one.
        """

    def should_stop(self) -> bool:
        """Whether nothing new is to be had, however much is told."""
