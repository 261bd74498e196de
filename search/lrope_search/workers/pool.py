"""A pool of workers that come and go: jobs wait for one, results come back, and who is lost is replaced.

Our own and not `concurrent.futures`, whose pools break for good as soon as one worker dies.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias, TypeVar

from lrope_gguf.errors import LropeError

from ..scores import Evaluation, Evaluator, Job

MAX_MOVES = 3
"""How often a job is given to another worker after the one that had it was lost."""

T = TypeVar("T")
Work: TypeAlias = Job | Callable[[Evaluator], Any]
"""What a worker is given to do with its evaluator: an evaluation, or a question about it (`Executor.ask`)."""


class Ready(NamedTuple):
    """A worker has its evaluator, of a model with ``n_layer`` layers."""

    n_layer: int


class Done(NamedTuple):
    """The result of the work."""

    result: Any


class Failed(NamedTuple):
    """A work or the start of a worker failed: the user's mistake, said in a line, or a traceback of ours."""

    text: str
    is_mistake: bool


class Lost(NamedTuple):
    """A worker is gone, or as good as gone; ``how``, in words."""

    how: str


Reply: TypeAlias = Ready | Done | Failed | Lost


def perform(work: Work, evaluator: Evaluator) -> Reply:
    """Do ``work`` in a worker."""
    try:
        return Done(work.run(evaluator) if isinstance(work, Job) else work(evaluator))
    except MemoryError:
        return Lost("out of memory")
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> Failed:
    """Return what a worker has to say of ``error``."""
    if isinstance(error, LropeError):
        return Failed(str(error), is_mistake=True)
    return Failed("".join(traceback.format_exception(error)), is_mistake=False)


class WorkerError(RuntimeError):
    """Something in a worker went wrong that no user could have put right; holds the worker's traceback."""


class WorkerPool(ABC):
    """An executor over workers of some kind, which a subclass starts, gives tasks, and listens to."""

    def __init__(self, n_workers: int) -> None:
        """Start ``n_workers`` and wait for the first of them to be ready."""
        self._n_workers = n_workers
        self._n_layer: int | None = None
        self._idle: deque[int] = deque()
        self._at_work: dict[int, Work] = {}  # by the worker that has it
        self._waiting: deque[Work] = deque()
        self._done: deque[tuple[Work, Any]] = deque()
        self._losses: dict[Work | None, int] = {}  # workers lost over a work, or (None) while they started
        try:
            for worker in range(n_workers):
                self._start(worker)
            while self._n_layer is None:
                self._listen()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _start(self, worker: int) -> None:
        """Start a worker; `_wait` will bring its `Ready`."""

    @abstractmethod
    def _send(self, worker: int, work: Work) -> None:
        """Give a work to a worker that is ready and has none."""

    @abstractmethod
    def _wait(self) -> Iterable[tuple[int, Reply]]:
        """Wait until at least one worker has replied or is lost, and return all who have."""

    @abstractmethod
    def _discard(self, worker: int) -> None:
        """Do away with what is left of a lost worker, before `_start` replaces it."""

    @abstractmethod
    def close(self) -> None:
        """Release the workers, whatever they are doing; no job may follow. Idempotent."""

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_layer(self) -> int:
        """Number of layers of the model that the workers hold."""
        assert self._n_layer is not None  # __init__ waits for it
        return self._n_layer

    @property
    def n_workers(self) -> int:
        """Number of workers, those included that are being replaced."""
        return self._n_workers

    def submit(self, job: Job) -> None:
        """Take one more job."""
        self._waiting.append(job)
        self._dispatch()

    def next(self) -> tuple[Job, Evaluation]:
        """Wait for any of the jobs submitted; see `Executor.next`.

        Raises:
            LropeError: an evaluation failed, or its workers were lost time after time.
            WorkerError: a fault of the program in a worker.
        """
        while not self._done:
            self._listen()
        work, score = self._done.popleft()
        assert isinstance(work, Job)
        return work, score

    def ask(self, function: Callable[[Any], T]) -> T:
        """Return what ``function``, which must be picklable, finds out from a worker's evaluator. Not between jobs."""
        self._waiting.append(function)
        while not self._done:
            self._listen()
        result: T = self._done.popleft()[1]
        return result

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            worker, work = self._idle.popleft(), self._waiting.popleft()
            self._at_work[worker] = work
            self._send(worker, work)

    def _listen(self) -> None:
        self._dispatch()
        for worker, reply in self._wait():
            match reply:
                case Ready(n_layer):
                    self._n_layer = n_layer
                    self._losses.pop(None, None)
                    self._idle.append(worker)
                case Done(result):
                    work = self._at_work.pop(worker)
                    self._losses.pop(work, None)
                    self._done.append((work, result))
                    self._idle.append(worker)
                case Failed(text, is_mistake):
                    raise LropeError(text) if is_mistake else WorkerError(f"in a worker:\n{text}")
                case Lost(how):
                    self._replace(worker, how)
        self._dispatch()

    def _replace(self, worker: int, how: str) -> None:
        work = self._at_work.pop(worker, None)
        if worker in self._idle:
            self._idle.remove(worker)
        self._losses[work] = self._losses.get(work, 0) + 1
        if self._losses[work] > MAX_MOVES:
            over = (
                f"over the evaluation of {work.split} {work.index}" if isinstance(work, Job) else "while they started"
            )
            raise LropeError(
                f"--workers {self._n_workers}: {self._losses[work]} workers were lost {over}, the last one {how}; if "
                "memory ran out, give fewer workers or shorter contexts; what was recorded is kept"
            )
        if work is not None:
            self._waiting.appendleft(work)
        self._discard(worker)
        self._start(worker)
