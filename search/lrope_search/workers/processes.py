"""Local worker processes, a model each: threads divided between them, GPUs handed out in turn."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from .pool import Lost, Ready, Reply, Work, WorkerPool, failure, perform
from .protocol import EvaluatorFactory

_EXIT_SECONDS = 10.0  # a process that closed its pipe has so long to end


class ProcessExecutor(WorkerPool):
    """Evaluates in processes of this machine.

    A worker that dies is replaced, and its job goes to another one. Should this process die, however it does, they end
    too. Raises `LropeError`: no evaluator could be made.

    Args:
        factory: Makes the evaluator in each worker.
        n_workers: Number of processes.
        n_threads: CPU threads of each of them; None: the evaluator's choice.
        gpus: Each worker sees one of these, in turn (``CUDA_VISIBLE_DEVICES``, which HIP heeds too); none: all.
    """

    def __init__(
        self,
        factory: EvaluatorFactory,
        n_workers: int,
        *,
        n_threads: int | None = None,
        gpus: Sequence[str] = (),
    ) -> None:
        self._factory, self._n_threads, self._gpus = factory, n_threads, tuple(gpus)
        self._spawn = multiprocessing.get_context("spawn")  # a fork would share what llama.cpp and CUDA have begun
        self._processes: dict[int, BaseProcess] = {}
        self._pipes: dict[int, Connection] = {}
        super().__init__(n_workers)

    def pids(self) -> list[int]:
        """Return the workers' process ids."""
        return [process.pid for _, process in sorted(self._processes.items()) if process.pid is not None]

    def close(self) -> None:
        """Kill the workers: they hold nothing that could be lost."""
        for process in self._processes.values():
            process.kill()
        for worker in list(self._processes):
            self._discard(worker)

    def _start(self, worker: int) -> None:
        ours, theirs = self._spawn.Pipe()
        gpu = self._gpus[worker % len(self._gpus)] if self._gpus else None
        process = self._spawn.Process(
            target=_work, args=(theirs, self._factory, self._n_threads, gpu), name=f"lrope-worker-{worker}", daemon=True
        )
        with _no_interrupt(), _without_main(self._factory):
            process.start()
        theirs.close()
        self._processes[worker], self._pipes[worker] = process, ours

    def _send(self, worker: int, work: Work) -> None:
        with suppress(OSError):  # it just died: `_wait` finds the end of its pipe
            self._pipes[worker].send(work)

    def _wait(self) -> Iterable[tuple[int, Reply]]:
        ready = connection.wait(list(self._pipes.values()))
        return [(worker, self._receive(worker)) for worker, pipe in self._pipes.items() if pipe in ready]

    def _receive(self, worker: int) -> Reply:
        with suppress(EOFError, OSError):
            reply: Reply = self._pipes[worker].recv()
            return reply
        process = self._processes[worker]
        process.join(_EXIT_SECONDS)
        code = process.exitcode
        if code is None:
            return Lost("no longer answering")
        return Lost(
            f"ended with status {code}" if code >= 0 else f"killed by signal {-code} ({signal.strsignal(-code)})"
        )

    def _discard(self, worker: int) -> None:
        process = self._processes.pop(worker)
        process.kill()
        process.join()
        self._pipes.pop(worker).close()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C is for the one who began: a process begun here is born deaf to it, from its first instruction."""
    signals = {signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main(factory: EvaluatorFactory) -> Iterator[None]:
    """Keep a process begun here from running the user's script again, unless the factory is part of it.

    `multiprocessing` does so for names that might be needed, and a script without ``if __name__ == "__main__"`` would
    begin its search once more.
    """
    main: dict[str, Any] = vars(sys.modules["__main__"])
    if getattr(factory, "__module__", "__main__") == "__main__":
        yield
        return
    hidden: dict[str, Any] = {name: main[name] for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(hidden)


def _work(pipe: Connection, factory: EvaluatorFactory, n_threads: int | None, gpu: str | None) -> None:
    """Be a worker: make an evaluator and evaluate, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        with factory(n_threads) as evaluator:
            pipe.send(Ready(evaluator.n_layer))
            with suppress(EOFError):
                while True:
                    pipe.send(perform(pipe.recv(), evaluator))
    except MemoryError:
        pipe.send(Lost("out of memory"))
    except Exception as error:
        pipe.send(failure(error))


def _end_with_parent() -> None:
    """A long evaluation must not outlive the search that wanted it."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
