"""Random search: what every other optimizer must beat."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .protocol import Candidate, Score
from .settings import LAG, BaselineConfig, lag_setting
from .space import Ledger, Space, Start


class RandomSearch:
    """Random smooth curves close to 1.

    Example:
        >>> from lrope_search.optimizers.space import CurveSpace
        >>> algorithm = RandomSearch(CurveSpace(4), seed=1)
        >>> algorithm.ask().factors
        (1.0, 1.0, 1.0, 1.0)

    ``max_retries``: curves drawn in place of one that was there before, until the space counts as exhausted.
    """

    def __init__(
        self,
        space: Space,
        start: Sequence[Start] | None = None,
        *,
        lag: int = LAG,
        seed: int = 0,
        width: float = 0.05,
        max_retries: int = 50,
    ) -> None:
        self.lag = lag
        self._space = space
        self._ledger = Ledger(space)
        self._queue = deque(space.known_good() if start is None else start)
        self._rng = np.random.default_rng(seed)
        self._width, self._max_retries = width, max_retries
        self._exhausted = False

    def should_stop(self) -> bool:
        """Whether fresh candidates ran out."""
        return self._exhausted

    def ask(self) -> Candidate | None:
        """Return the next curve; None if ``lag`` are pending or at the end."""
        if self._exhausted or len(self._ledger.pending) >= self.lag:
            return None
        for _ in range(self._max_retries):
            drawn = self._queue.popleft() if self._queue else (self._space.smooth(self._rng, self._width), "random")
            candidate = self._ledger.issue(*drawn)
            if candidate is not None:
                return candidate
        self._exhausted = True
        return None

    def tell(self, candidate: Candidate, score: Score) -> None:
        """Note a score, which changes nothing. Raises `ValueError`: it is not the oldest candidate pending."""
        self._ledger.settle(candidate, score)


@dataclass(frozen=True, kw_only=True)
class RandomConfig(BaselineConfig):
    """Settings of `RandomSearch`."""

    section = "random"
    summary = "random candidates, as a baseline"
    algorithm = RandomSearch

    lag: int = lag_setting()
