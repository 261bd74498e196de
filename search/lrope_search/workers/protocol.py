"""Executors (as in `concurrent.futures`) move jobs to where a model is; they know of neither search nor model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias, TypeVar

from lrope_gguf.errors import LropeError

from ..scores import Evaluation, Evaluator, Job

T = TypeVar("T")

EvaluatorFactory: TypeAlias = Callable[[int | None], AbstractContextManager[Evaluator]]
"""Makes an evaluator in the worker that will use it, given the number of CPU threads it may take (None: its choice).

It travels to other processes and machines: it must be picklable, so hold a model's path and options, not a model.
"""


class Executor(Protocol):
    """Runs jobs anywhere and gives each result, tagged by its job, as soon as it is there.

    The order of results is free: who consumes them must not depend on it. A worker that is lost (killed, out of
    memory) costs a repetition, not a result.
    """

    @property
    def n_layer(self) -> int:
        """Number of layers of the model that the workers hold."""

    @property
    def n_workers(self) -> int:
        """How many jobs can run at once."""

    def submit(self, job: Job) -> None:
        """Take one more job. More than ``n_workers`` at once wait for their turn."""

    def next(self) -> tuple[Job, Evaluation]:
        """Wait for any of the jobs submitted and return its result, each once.

        Raises `LropeError`: an evaluation that failed for a reason its evaluator names, or whose workers were lost time
        after time.
        """

    def ask(self, function: Callable[[Any], T]) -> T:
        """Return what ``function``, which must be picklable, finds out from a worker's evaluator. Not between jobs."""


class LocalExecutor:
    """One evaluator in this process, one job after the other."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._jobs: deque[Job] = deque()

    @property
    def n_layer(self) -> int:
        """Number of layers of the evaluator's model."""
        return self._evaluator.n_layer

    @property
    def n_workers(self) -> int:
        """One."""
        return 1

    def submit(self, job: Job) -> None:
        """Take one more job."""
        self._jobs.append(job)

    def next(self) -> tuple[Job, Evaluation]:
        """Evaluate the oldest job. Raises `LropeError`: the evaluator's, or memory ran out."""
        job = self._jobs.popleft()
        try:
            return job, job.run(self._evaluator)
        except MemoryError:
            raise LropeError(
                f"memory ran out over the evaluation of {job.split} {job.index}; what was recorded is kept: the same "
                "command resumes"
            ) from None

    def ask(self, function: Callable[[Any], T]) -> T:
        """Return what ``function`` finds out from the evaluator."""
        return function(self._evaluator)
