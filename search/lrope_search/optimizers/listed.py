"""An optimizer of what is known beforehand: heads have no space that a genetic search would walk through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from lrope_gguf.curve import Curve

from ..scores import Factors
from .protocol import Candidate, Score

Entry: TypeAlias = tuple[Curve | None, Factors, str]
"""What makes the factors, if a curve does, the factors, and their origin."""


class Listed:
    """Asks for a list, in its order, and for nothing further; the same factors once.

    Example:
        >>> algorithm = Listed([(None, (1.0, 1.0), "identity"), (None, (1.1, 1.0), "gradient")])
        >>> algorithm.ask().origin, algorithm.ask().origin, algorithm.ask()
        ('identity', 'gradient', None)
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        first: dict[Factors, Entry] = {}
        for entry in entries:
            first.setdefault(entry[1], entry)
        self._candidates = [Candidate(i, *entry) for i, entry in enumerate(first.values())]
        self._n_asked = self._n_told = 0

    @property
    def lag(self) -> int:
        """All may be asked for at once."""
        return len(self._candidates)

    def ask(self) -> Candidate | None:
        """Return the next one; None at the end."""
        if self.should_stop():
            return None
        self._n_asked += 1
        return self._candidates[self._n_asked - 1]

    def tell(self, candidate: Candidate, score: Score) -> None:
        """Take a score. Raises `ValueError`: it is not the oldest candidate that was asked for and not told."""
        if self._n_told == self._n_asked or candidate != self._candidates[self._n_told]:
            raise ValueError(f"told of candidate {candidate.id}, which is not the next one")
        self._n_told += 1

    def should_stop(self) -> bool:
        """Whether all were asked for."""
        return self._n_asked == len(self._candidates)
