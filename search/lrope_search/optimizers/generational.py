"""Optimizers that think in whole generations, behind the steady-state protocol."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import TypeAlias

from .protocol import Candidate, Score
from .space import Ledger, Space, Start

Generations: TypeAlias = Generator[Sequence[Start], list[Score], None]
"""Yields the genomes of a generation with their origins; is sent their scores, in the same order."""

_PER_CONTEXT = 1e6  # nats; more than any fitness


def minimised(score: Score) -> float:
    """Return a finite number for minimisers that orders as scores do: more contexts first, then fitness."""
    contexts, fitness = score
    limit = _PER_CONTEXT / 4.0
    return -(contexts * _PER_CONTEXT + min(max(fitness, -limit), limit))


class Generational:
    """Asks for a generation one by one; a genome whose factors were evaluated before only gets the same score."""

    def __init__(self, space: Space, generations: Generations, *, lag: int, max_retries: int = 50) -> None:
        """Run ``generations``, at whose end nothing is left to try; ``lag``: size of the largest one.

        After ``max_retries`` generations in a row without anything new the optimizer counts as converged.
        """
        self.lag = lag
        self._ledger = Ledger(space)
        self._generations = generations
        self._max_retries = max_retries
        self._queue: deque[Start] = deque()  # of this generation, not yet asked for
        self._ids: list[int] = []  # of this generation's members, in order
        self._begun = self._ended = False

    def should_stop(self) -> bool:
        """Whether the optimizer ended or repeats itself."""
        return self._ended

    def ask(self) -> Candidate | None:
        """Return the next member that is new; None while the generation's scores are awaited, or at the end."""
        for _ in range(self._max_retries):
            candidate = self._issue()
            if candidate is not None or self._ended or self._ledger.pending:
                return candidate
            self._advance()
        self._ended = True
        return None

    def tell(self, candidate: Candidate, score: Score) -> None:
        """Note a score. Raises `ValueError`: it is not the oldest candidate that was asked for and not told."""
        self._ledger.settle(candidate, score)

    def _issue(self) -> Candidate | None:
        while self._queue:
            genome, origin = self._queue.popleft()
            known = self._ledger.find(genome)
            if known is None:
                candidate = self._ledger.issue(genome, origin)
                self._ids.append(len(self._ledger.genomes) - 1)
                return candidate
            self._ids.append(known)
        return None

    def _advance(self) -> None:
        """Let the optimizer see the scores and make its next generation."""
        try:
            if self._begun:
                members = self._generations.send([self._ledger.scores[i] for i in self._ids])
            else:
                members, self._begun = next(self._generations), True
        except StopIteration:
            self._ended, members = True, ()
        self._queue.extend(members)
        self._ids = []
