"""Layer factors side by side on the same contexts, without a search: model, task and sides in, a table out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError

from .evaluation.evaluator import Facts
from .evaluation.generation import Generation
from .evaluation.make import check_factors, write_job
from .evaluation.settings import ModelConfig
from .results.comparison import Comparison, compare
from .results.table import DepthTable, depth_table, gains_words
from .scores import ContextScore, Factors, Job, rows_of
from .session import Show, open_session
from .study.progress import Progress
from .study.store import Study
from .tasks.make import make_tasks
from .tasks.settings import TaskMix, Tasks
from .workers.protocol import Executor
from .workers.settings import WorkersConfig


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Attributes:
        asked: The task's identity, the split, and the lead that the model writes.
        sides: The factors of each side, by name; the first, ``base``, is all 1.
        scores: Of each side, the contexts' scores, which pair with those of another model on the same contexts.
        table: Accuracy and log-probability by depth.
        generated: The same with the correctness of answers that the model wrote; None if it was not let write.
        agreement: Share of probes that both ways judge alike; None likewise.
        n_tokens: Tokens computed for ``table``.
        seconds: What that took.
        beside: What the first side but the base gains over each further one, by that one's name.
    """

    asked: Mapping[str, Any]
    sides: Mapping[str, Factors]
    scores: Mapping[str, Sequence[ContextScore]]
    table: DepthTable
    generated: DepthTable | None
    agreement: float | None
    n_tokens: int
    seconds: float
    beside: Mapping[str, Comparison] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Return everything, for `json.dumps`."""
        document = {
            "task": self.asked,
            "factors": self.sides,
            **({"heads": heads} if (heads := {n: rows for n, f in self.sides.items() if (rows := rows_of(f))}) else {}),
            **self.table.json(),
            **({"beside": {name: one.to_json() for name, one in self.beside.items()}} if self.beside else {}),
            "tokens": self.n_tokens,
            "tokens_per_second": self.n_tokens / self.seconds,
        }
        if self.generated is not None:
            document["generated"] = self.generated.json() | {"agreement": self.agreement}
        return document

    def __str__(self) -> str:
        """Return the table, the accuracies of written answers if there are any, and the speed."""
        text = str(self.table)
        for name, one in self.beside.items():
            text += f"\n{list(self.sides)[1]} over {name}: {gains_words(one)}"
        if self.generated is not None:
            text += f"\n\nanswers written by the model; {self.agreement:.1%} of them agree with the scores above\n"
            for name, cell in self.generated.totals.items():
                text += f"\n{name}: {100 * cell.accuracy:.1f} %"
        return f"{text}\n\n{self.n_tokens} tokens, {self.n_tokens / self.seconds:.0f} tokens/s"


def measure(
    model: ModelConfig,
    task: Tasks,
    sides: Mapping[str, Factors],
    *,
    uniform: Sequence[float] = (),
    contexts: int = 8,
    split: str = "test",
    generate: bool = False,
    directory: str | os.PathLike[str] | None = None,
    workers: WorkersConfig | None = None,
    progress: Show = True,
) -> Measurement:
    """Ask the same contexts under each side's factors and under none.

    Example:
        >>> from lrope_search import ModelConfig, measure, task_config
        >>> model, factors = ModelConfig("model.gguf"), (1.0,) * 8 + (1.2,) + (1.0,) * 15
        >>> print(measure(model, task_config("kv", keys=100), {"layer 8": factors}))  # doctest: +SKIP

    Args:
        model: The model and how it is run.
        task: What it is asked; several tasks take turns, and their weights (`TaskMix`) are those of the means.
        sides: Factors by name, one for each layer; ``base`` comes of itself, whatever the file holds.
        uniform: Further sides: the same factor for all layers that rotate over the whole context, as a search tries it.
        contexts: How many.
        split: Which: ``search``, ``validation`` or ``test``.
        generate: Also let the model write its answers, and score these; they are not kept, and one worker writes them.
        directory: Keeps each evaluation (a `Study` without a search), so that a later call goes on, with more sides
            and contexts if wanted; None: nothing is kept.
        workers: How many workers, and where; None: on this machine, the number that is fastest.
        progress: True shows it on the standard error, False does not; a function gets each line.

    Raises:
        LropeError: the model or the task cannot be used, or llama.cpp refuses the factors; another search or
            measurement has the directory.
    """
    mix, workers = TaskMix.of(task), workers or WorkersConfig()
    mix.check_contexts("--contexts", contexts)
    if generate and workers.n_workers not in (None, 1):
        raise LropeError("--generate: one worker writes all answers; leave out --workers")
    questions = make_tasks(mix)
    for index in range(contexts - len(mix.parts), contexts):
        questions.context(split, index)  # too few records are better known now
    place = None if directory is None else Path(directory)

    def bind(facts: Facts, first: Executor) -> dict[str, Any]:
        all_sides.update(sides)
        for factor in uniform:
            moved = frozenset(facts.layers)
            all_sides[f"uniform {factor:g}"] = tuple(factor if i in moved else 1.0 for i in range(first.n_layer))
        first.ask(partial(check_factors, tuple(all_sides.values())))
        return {}

    all_sides: dict[str, Factors] = {}
    with open_session(model, mix, workers, place, "measurement", bind=bind, progress=progress) as session:
        facts, study = session.facts, session.study
        if uniform:
            moved = f"{len(facts.layers)} of {session.n_layer} layers move"
            session.progress.line(f"uniform: {moved}, those that rotate over the whole context")
        sides = {"base": (1.0,) * session.n_layer, **all_sides}
        jobs = [Job(factors, split, index) for index in range(contexts) for factors in dict.fromkeys(sides.values())]
        session.divide(sum(study.lookup(job) is None for job in jobs), 1 if generate else len(jobs))
        answers = _ask(session.executor(), study, jobs, session.progress, generate=generate)
        scores: dict[str, list[ContextScore]] = {}
        written: dict[str, list[tuple[Generation, ...]]] = {}
        for name, factors in sides.items():
            own = [Job(factors, split, index) for index in range(contexts)]
            scores[name] = [score for job in own if isinstance(score := study.results[job], ContextScore)]
            written[name] = [answers[job] for job in own if generate]
        for turn, sample in enumerate(facts.samples):
            base = scores["base"][turn :: len(facts.samples)]
            right = [a for context in written["base"][turn :: len(facts.samples)] for a in context if a.share]
            if not right and not any(score.accuracy for score in base):
                session.progress.line(sample.advice(sum(len(score.probes) for score in base)))
        config = study.config
    every = [score for side in scores.values() for score in side]
    told = (answer for side in written.values() for context in side for answer in context)
    same = [p.correct == a.correct for p, a in zip((p for s in every for p in s.probes), told, strict=generate)]
    generated = {name: _generated(scores[name], written[name]) for name in sides if generate}
    _, *others = sides
    return Measurement(
        asked=config["task"] | {"split": split} | {name: config[name] for name in ("llama_options",) if name in config},
        sides=sides,
        scores=scores,
        table=depth_table(scores, weights=mix.weights),
        generated=depth_table(generated, weights=mix.weights) if generate else None,
        agreement=sum(same) / len(same) if generate else None,
        n_tokens=sum(score.n_tokens for score in every),
        seconds=sum(score.seconds for score in every),
        beside={name: compare(scores[name], scores[others[0]], weights=mix.weights) for name in others[1:]},
    )


def _ask(
    executor: Executor, study: Study, jobs: Sequence[Job], progress: Progress, *, generate: bool
) -> dict[Job, tuple[Generation, ...]]:
    """Have everything evaluated that is not on record yet; return the answers that the model wrote, if it is let."""
    answers: dict[Job, tuple[Generation, ...]] = {}
    left = Counter(job.index for job in jobs if study.lookup(job) is None)
    progress.start(len(jobs))
    for _ in range(len(jobs) - left.total()):
        progress.advance(replayed=True)
    # what is written goes on from what was just fed: one after the other
    for batch in [[job] for job in jobs] if generate else [jobs]:
        asked = [job for job in batch if study.lookup(job) is None]
        for job in asked:
            executor.submit(job)
        for _ in asked:
            done, score = executor.next()
            study.record(done, score)
            progress.advance()
            left[done.index] -= 1
            if not left[done.index]:
                progress.line(f"{done.split} context {done.index}: {progress.status()}")
        if generate:
            answers |= {job: executor.ask(partial(write_job, job)) for job in batch}
    progress.close()
    return answers


def _generated(scores: Sequence[ContextScore], answers: Sequence[Sequence[Generation]]) -> list[ContextScore]:
    """Return the scores with the written answers' correctness, or the share of what each should hold."""
    return [
        replace(score, probes=tuple(replace(p, correct=a.share) for p, a in zip(score.probes, answer, strict=True)))
        for score, answer in zip(scores, answers, strict=True)
    ]
