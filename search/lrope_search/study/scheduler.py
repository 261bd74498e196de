"""Keeps the workers busy: what is needed now goes first, what will be needed fills the gaps, nothing is done twice."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from enum import IntEnum

from ..scores import Evaluation, Job
from ..workers.protocol import Executor
from .progress import Progress
from .store import Study


class Urgency(IntEnum):
    """In which order jobs start."""

    NOW = 0
    """The search cannot go on without it."""
    SOON = 1
    """It will be needed whatever comes."""
    MAYBE = 2
    """It may be needed: only for workers that would idle."""


class Pipeline:
    """Results of one search: from this run, from the study, or from the executor."""

    def __init__(self, executor: Executor, study: Study, progress: Progress) -> None:
        self._executor, self._study, self._progress = executor, study, progress
        self._queue: list[tuple[Urgency, int, int, Job]] = []  # urgency, caller's order, order of asking
        self._n_asked = itertools.count()
        self._running: set[Job] = set()
        self.results: dict[Job, Evaluation] = {}
        self.n_fresh = 0
        """Results that were not replayed."""

    def want(self, jobs: Iterable[Job], urgency: Urgency = Urgency.NOW, order: int = 0) -> None:
        """Have ``jobs`` done, the lower ``order`` first among equally urgent ones; what is known already is not."""
        for job in jobs:
            if job in self.results or job in self._running:
                continue
            score = self._study.lookup(job)
            if score is None:
                heapq.heappush(self._queue, (urgency, order, next(self._n_asked), job))
            else:
                self.results[job] = score
                self._progress.advance(replayed=True)

    def step(self) -> None:
        """Give every idle worker what is most urgent, and wait for one result, which is on disk on return.

        Raises `LropeError`: the executor could not get it, or the study could not keep it.
        """
        while self._queue and len(self._running) < self._executor.n_workers:
            *_, job = heapq.heappop(self._queue)
            if job not in self.results and job not in self._running:
                self._running.add(job)
                self._executor.submit(job)
        if not self._running:
            raise RuntimeError("waiting for results that nobody asked for")
        job, score = self._executor.next()
        self._study.record(job, score)
        self._running.remove(job)
        self.results[job] = score
        self.n_fresh += 1
        self._progress.advance()

    def get(self, jobs: Iterable[Job]) -> list[Evaluation]:
        """Return the results of ``jobs``, as urgently as can be."""
        jobs = list(jobs)
        self.want(jobs)
        while any(job not in self.results for job in jobs):
            self.step()
        return [self.results[job] for job in jobs]
