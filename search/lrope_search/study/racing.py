"""Racing: every candidate sees the first contexts, and only the best of them see more."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..optimizers.protocol import Score


@dataclass(frozen=True)
class Racing:
    """Asynchronous successive halving over contexts (Li et al., arXiv 1810.05934), made deterministic.

    Candidates climb rungs; the first brings ``first`` contexts, each further one ``1 / fraction`` times as many in
    all, the last ``n_contexts``. A candidate goes on if it is among the best ``fraction`` of the last ``window``
    candidates that came to its rung up to itself, in the order of their ids. So what becomes of it depends on the
    scores of a fixed set of candidates, never on time. ``fraction = 1`` turns racing off.
    """

    n_contexts: int
    first: int = 1
    fraction: float = 0.5
    window: int = 32

    def stops(self) -> tuple[int, ...]:
        """Return the contexts that a candidate has seen at the end of each rung."""
        stops = [self.n_contexts if self.fraction == 1.0 else min(self.first, self.n_contexts)]
        while stops[-1] < self.n_contexts:
            stops.append(min(math.ceil(stops[-1] / self.fraction), self.n_contexts))
        return tuple(stops)

    def expected_evaluations(self, n_candidates: int) -> int:
        """Return about how many context evaluations ``n_candidates`` take; more if later ones tend to be better."""
        total, start, left = 0.0, 0, float(n_candidates)
        for stop in self.stops():
            total += left * (stop - start)
            start, left = stop, left * self.fraction
        return math.ceil(total)


class Race:
    """All candidates of a search on their rungs.

    `enter` takes them in the order of their ids; whenever there are new results, `advance` says who sees which
    contexts next, and `scores` holds those whose race is over.
    """

    def __init__(self, racing: Racing) -> None:
        self._stops = racing.stops()
        self._fraction = racing.fraction
        self._waiting: list[deque[int]] = [deque() for _ in self._stops]  # ids on each rung, in order
        self._window: list[deque[float]] = [deque(maxlen=racing.window) for _ in self._stops]
        self._spared: set[int] = set()
        self.scores: dict[int, Score] = {}

    def enter(self, candidate: int, *, spared: bool = False) -> range:
        """Let the next id in and return the contexts that it is to see first; who is ``spared`` sees all in the end."""
        self._waiting[0].append(candidate)
        if spared:
            self._spared.add(candidate)
        return range(self._stops[0])

    def advance(self, fitness: Callable[[int, int], float | None]) -> Iterator[tuple[int, range]]:
        """Yield ``(id, contexts)`` for everybody who goes on.

        ``fitness(id, n)`` is that on the first ``n`` contexts, None as long as one of them is missing.
        """
        for rung, stop in enumerate(self._stops):
            waiting, window = self._waiting[rung], self._window[rung]
            while waiting and (value := fitness(waiting[0], stop)) is not None:
                candidate = waiting.popleft()
                window.append(value)
                better = sum(other > value for other in window)
                good = better < math.ceil(self._fraction * len(window)) or candidate in self._spared
                goes_on = good and value > -math.inf
                if stop == self._stops[-1] or not goes_on:
                    self.scores[candidate] = (stop, value)
                else:
                    self._waiting[rung + 1].append(candidate)
                    yield candidate, range(stop, self._stops[rung + 1])
