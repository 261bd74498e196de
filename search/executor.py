"""Executors move evaluations to where a model is loaded; they know of neither search nor model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from .types import ContextScore, Evaluator


@dataclass(frozen=True, slots=True)
class Job:
    """One evaluation: layer factors on context ``index`` of ``split``."""

    factors: tuple[float, ...]
    split: str
    index: int


class Executor(Protocol):
    """Runs jobs anywhere and yields each result, tagged by its job, as soon as it is there.

    The order of results is free: who consumes them must not depend on it.
    """

    @property
    def n_layer(self) -> int:
        """Number of layers of the model that the workers hold."""
        ...

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, ContextScore]]:
        """Yield exactly one result for every job, in order of completion."""
        ...

    def close(self) -> None:
        """Release the workers; no job may follow."""
        ...


class LocalExecutor:
    """One evaluator in this process, one job after the other."""

    def __init__(self, evaluator: Evaluator) -> None:
        """Hold ``evaluator``, whose lifetime stays the caller's concern."""
        self._evaluator = evaluator

    @property
    def n_layer(self) -> int:
        """Number of layers of the evaluator's model."""
        return self._evaluator.n_layer

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, ContextScore]]:
        """Yield the results in the order of the jobs."""
        for job in jobs:
            yield job, self._evaluator.evaluate(job.factors, job.split, job.index)

    def close(self) -> None:
        """Nothing to release."""
