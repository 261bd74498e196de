"""Makes model, task and evaluator from their settings, in any process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError

from ..scores import Factors, Job
from ..tasks.make import make_task, make_tasks
from ..tasks.mix import mixed
from ..tasks.settings import TaskConfig, TaskMix, Tasks
from ..tasks.task import Task
from .divergence import LONG_TOKENS, SHORT_TOKENS, Guard, GuardTexts, read_texts, write_texts
from .encoding import Encoding
from .evaluator import SCORINGS, Facts, TeacherForcedEvaluator
from .generation import Generation
from .lead import Lead
from .model import Model
from .parallel import Parallelism, fastest, measure_rates
from .settings import ModelConfig


def open_model(config: ModelConfig) -> Model:
    """Load the model. Raises `LropeError`: it cannot be loaded."""
    return Model(
        config.path,
        n_batch=config.batch_size,
        n_threads=config.n_threads,
        n_gpu_layers=config.n_gpu_layers,
        chat=config.chat_template,
        verbose=config.verbose,
        llama_options=config.llama_options(),
    )


def task_for(model: Model, config: TaskConfig) -> Task:
    """Return the task, its contexts sized by the model's tokenizer where they are sized by tokens."""
    return make_task(config, lambda text: len(model.tokenize_prompt(text, config.answer_prefix)))


@dataclass(frozen=True)
class EvaluatorSpec:
    """All that a worker needs to make its evaluator (an `EvaluatorFactory`).

    Args:
        model: The model and how it is run.
        task: What it is asked.
        guard_text: File of the guard's text; None: the base model writes it, from the (first) task's seed.
        guard_texts: The text itself, once a worker has found out (`find_out`).
        scoring, leads: See `TeacherForcedEvaluator`; None until a worker has found out.
        guarded: Whether there is a guard at all.
        choices: Divisions of the cores, measured where no layer is on a GPU; the worker has the fastest of one worker.
    """

    model: ModelConfig
    task: Tasks
    guard_text: str | None = None
    guard_texts: GuardTexts | None = None
    scoring: str | None = None
    guarded: bool = True
    leads: tuple[Lead, ...] | None = None
    choices: tuple[Parallelism, ...] = ()

    def settled(self, facts: Facts) -> EvaluatorSpec:
        """Return this with what a first worker has found out, in which all of them must agree."""
        model = replace(self.model, batch_size=facts.batch_size)
        texts, scoring, leads = facts.guard_texts, facts.scoring, facts.leads
        return replace(self, model=model, guard_texts=texts, scoring=scoring, leads=leads, choices=())

    @contextmanager
    def __call__(self, n_threads: int | None = None) -> Iterator[TeacherForcedEvaluator]:
        """Load the model with so many threads (None: what its settings say) and yield the evaluator.

        Raises `LropeError`: the model, the task or the guard's text cannot be used.
        """
        make_tasks(self.task)  # what is wrong with it shows at once
        with open_model(replace(self.model, n_threads=n_threads or self.model.n_threads)) as model:
            configs = TaskMix.of(self.task).tasks
            task = mixed([task_for(model, config) for config in configs])
            for index in range(len(configs)):  # nor is anything measured or written for contexts that cannot be
                task.context("search", index)
            rates = {} if model.on_gpu or not self.choices else measure_rates(model, self.choices)
            if rates:
                alone = {division: rate for division, rate in rates.items() if division.n_workers == 1}
                model.set_threads(fastest(alone).n_threads)
            texts = (self.guard_texts or self._texts(model)) if self.guarded else None
            prefixes = tuple(config.answer_prefix for config in configs)
            guard = None if texts is None else Guard(model, texts)
            evaluator = TeacherForcedEvaluator(
                model, task, answer_prefix=prefixes, guard=guard, scoring=self.scoring, leads=self.leads
            )
            evaluator.rates = rates
            yield evaluator

    def _texts(self, model: Model) -> GuardTexts:
        short, long = min(SHORT_TOKENS, model.n_ctx_train // 2), min(LONG_TOKENS, model.n_ctx_train)
        if self.guard_text is not None:
            return read_texts(model, self.guard_text, short=short, long=long)
        return write_texts(model, TaskMix.of(self.task).tasks[0].seed, short=short, long=long)


def kept_guard_texts(kept: Any, directory: Path) -> GuardTexts | None:
    """Return the texts that a study kept, from their JSON; None: it kept none. Raises `LropeError`: it is damaged."""
    if kept is None:
        return None
    try:
        return GuardTexts(tuple(tuple(map(int, text)) for text in kept["short"]), tuple(map(int, kept["long"])))
    except (ValueError, TypeError, KeyError):
        raise LropeError(f"{directory / 'guard.json'}: is damaged; choose another study directory") from None


def kept_computing(config: Any) -> tuple[int | None, str | None]:
    """Return the batch size of a study and who scored it, from its ``config.json``; None where it says nothing usable.

    What is computed otherwise differs by rounding, so that a study stays with what it began with. One that does not say
    who scored was scored by the host, as all were once; one that is yet to begin (None), by nobody.
    """
    if config is None:
        return None, None
    computing = config.get("computing") if isinstance(config, dict) else None
    said = computing if isinstance(computing, dict) else {}
    size, scoring = said.get("batch_size"), said.get("scoring")
    usable = isinstance(size, int) and not isinstance(size, bool) and size > 0
    return size if usable else None, scoring if scoring in SCORINGS else SCORINGS[0]


def find_out(evaluator: TeacherForcedEvaluator) -> Facts:
    """Return what the evaluator of an `EvaluatorSpec` knows; runs in its worker."""
    return evaluator.facts()


def encode(split: str, index: int, evaluator: TeacherForcedEvaluator) -> Encoding:
    """Return a context in tokens; runs in a worker."""
    return evaluator.encoding(split, index)


def use_threads(n_threads: int, evaluator: TeacherForcedEvaluator) -> None:
    """Let the evaluator compute with so many threads; runs in a worker."""
    evaluator.use_threads(n_threads)


def check_factors(sides: Sequence[Factors], evaluator: TeacherForcedEvaluator) -> None:
    """Refuse factors that llama.cpp refuses; runs in a worker. Raises `LropeError`: names what is wrong with them."""
    for factors in sides:
        evaluator.check(factors)


def write_job(job: Job, evaluator: TeacherForcedEvaluator) -> tuple[Generation, ...]:
    """Let the model write its answers (`TeacherForcedEvaluator.generate`); runs in a worker."""
    return evaluator.generate(job.factors, job.split, job.index)
