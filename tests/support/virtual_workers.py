"""Workers on paper: jobs take virtual time, so that a cluster can be planned that nobody has yet."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

from lrope_search.scores import Evaluation, Evaluator, Job
from lrope_search.workers.protocol import LocalExecutor


class Span(NamedTuple):
    worker: int
    start: float
    end: float
    job: Job


class VirtualExecutor(LocalExecutor):
    """Any number of workers, whose jobs take as long as ``duration`` says and come back in the order of their ends.

    The evaluator is asked here, one job after the other; what it takes to do so counts for nothing. The same
    durations give the same spans, whatever the machine.

    Args:
        evaluator: Scores; stays the caller's.
        n_workers: Number of workers.
        duration: Virtual time of a job, in any unit.
    """

    def __init__(self, evaluator: Evaluator, n_workers: int, duration: Callable[[Job], float]) -> None:
        super().__init__(evaluator)
        self._n_workers = n_workers
        self._duration = duration
        self._idle = [(0.0, worker) for worker in range(n_workers)]  # since when; the longest idle first
        self._running: list[tuple[float, int, Span]] = []
        self.now = 0.0
        self.spans: list[Span] = []
        """All that was begun, in order."""
        self.gaps: list[tuple[float, float]] = []
        """When a worker idled before it was given a job: from, to."""

    @property
    def n_workers(self) -> int:
        return self._n_workers

    def submit(self, job: Job) -> None:
        """Begin a job on the worker that has idled longest."""
        since, worker = heapq.heappop(self._idle)
        span = Span(worker, self.now, self.now + self._duration(job), job)
        heapq.heappush(self._running, (span.end, len(self.spans), span))
        self.spans.append(span)
        if since < self.now:
            self.gaps.append((since, self.now))

    def next(self) -> tuple[Job, Evaluation]:
        self.now, _, span = heapq.heappop(self._running)
        heapq.heappush(self._idle, (self.now, span.worker))
        return span.job, span.job.run(self._evaluator)

    def busy(self, until: float) -> float:
        """Return the share of all workers' time from 0 to ``until`` that they were at work."""
        total = sum(min(span.end, until) - span.start for span in self.spans if span.start < until)
        return total / (self._n_workers * until)
