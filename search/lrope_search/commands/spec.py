"""What a worker needs to make its evaluator, and what the first of them finds out for all."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError

from ..evaluation.divergence import LONG_TOKENS, SHORT_TOKENS, Guard, GuardTexts, read_texts, write_texts
from ..evaluation.evaluator import TeacherForcedEvaluator
from ..evaluation.memory import MemoryNeeded
from ..evaluation.model import Model
from ..scores import Evaluator
from ..tasks import Task
from .options import fit_task, open_model, open_task


class _Evaluator(TeacherForcedEvaluator):
    """An evaluator with a guard, whose texts it remembers."""

    def __init__(self, model: Model, task: Task, texts: GuardTexts, *, answer_prefix: str) -> None:
        super().__init__(model, task, answer_prefix=answer_prefix, guard=Guard(model, texts))
        self.guard_texts = texts


@dataclass(frozen=True)
class EvaluatorSpec:
    """The options of model and task: makes the evaluator in whatever process it finds itself.

    Args:
        args: Options of the command line; plain values only.
        guard_text: File of the guard's text; None: the base model writes it.
        guard_texts: The text itself, once a worker has found out.
    """

    args: argparse.Namespace
    guard_text: str | None = None
    guard_texts: GuardTexts | None = None

    @contextmanager
    def __call__(self, n_threads: int | None = None) -> Iterator[_Evaluator]:
        """Load the model with so many threads (None: what the options say) and yield the evaluator.

        Raises:
            LropeError: the model, the task or the guard's text cannot be used.
        """
        args = argparse.Namespace(**vars(self.args))
        args.threads = n_threads or args.threads
        task = open_task(args)
        with open_model(args) as model:
            task = fit_task(task, args, model)
            texts = self.guard_texts or self._texts(model)
            yield _Evaluator(model, task, texts, answer_prefix=args.answer_prefix)

    def _texts(self, model: Model) -> GuardTexts:
        short, long = min(SHORT_TOKENS, model.n_ctx_train // 2), min(LONG_TOKENS, model.n_ctx_train)
        if self.guard_text is not None:
            return read_texts(model, self.guard_text, short=short, long=long)
        return write_texts(model, self.args.seed, short=short, long=long)


def read_guard_texts(kept: Any, directory: Path) -> GuardTexts | None:
    """Return the texts that a study kept, from their JSON; None if it kept none.

    Raises:
        LropeError: that JSON is something else.
    """
    if kept is None:
        return None
    try:
        return GuardTexts(tuple(tuple(map(int, text)) for text in kept["short"]), tuple(map(int, kept["long"])))
    except (ValueError, TypeError, KeyError):
        raise LropeError(f"{directory / 'guard.json'}: is damaged; choose another study directory") from None


@dataclass(frozen=True)
class Facts:
    """What only a loaded model can say, and all workers must agree on."""

    lead: str
    guard_texts: GuardTexts
    memory: MemoryNeeded


def find_out(evaluator: Evaluator) -> Facts:
    """Return what the evaluator of an `EvaluatorSpec` knows; runs in its worker."""
    assert isinstance(evaluator, _Evaluator)
    return Facts(evaluator.lead, evaluator.guard_texts, evaluator.memory_needed())
