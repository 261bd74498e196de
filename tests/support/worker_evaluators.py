"""Evaluator factories for workers in other processes: synthetic, slow, mortal, greedy."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lrope_gguf.errors import LropeError
from lrope_search.scores import ContextScore, Evaluator
from support.synthetic import Landscape


class _Workers(Landscape):
    def __init__(self, spec: Workers, n_threads: int | None) -> None:
        super().__init__()
        self.spec, self.n_threads = spec, n_threads

    def evaluate(self, factors: tuple[float, ...], split: str, index: int) -> ContextScore:
        spec = self.spec
        if spec.seconds:
            time.sleep(spec.seconds * (1 + hash((factors, split, index)) % 5))
        if (split, index) == spec.fatal and self._first():
            if spec.death == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if spec.death == "memory":
                raise MemoryError
            if spec.death == "exit":
                os._exit(7)
            if spec.death == "mistake":
                raise LropeError("data.jsonl: context 3 is missing; give another file")
            raise ZeroDivisionError("a fault")
        return super().evaluate(factors, split, index)

    def _first(self) -> bool:
        for i in range(self.spec.times):
            with contextlib.suppress(FileExistsError):
                Path(self.spec.directory, f"death{i}").touch(exist_ok=False)
                return True
        return False


@dataclass(frozen=True)
class Workers:
    """A factory. Over context ``fatal`` the first ``times`` workers die the way that ``death`` says."""

    directory: str = ""
    death: str = ""
    fatal: tuple[str, int] | None = None
    times: int = 1
    seconds: float = 0.0
    broken: str = ""

    @contextlib.contextmanager
    def __call__(self, n_threads: int | None) -> Iterator[Evaluator]:
        if self.broken == "mistake":
            raise LropeError("model.gguf: no such file")
        if self.broken == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        yield _Workers(self, n_threads)


def see(evaluator: Evaluator) -> tuple[int | None, str | None, int]:
    assert isinstance(evaluator, _Workers)
    return evaluator.n_threads, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()
