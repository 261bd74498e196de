"""The stage of a search that follows derivatives: whether it can be, what it takes, and what makes its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lrope_gguf.errors import LropeError

from .evaluation.encoding import Encoding
from .evaluation.make import encode
from .gradient.ascent import AscentConfig
from .gradient.climb import Climb, check_installed, conflicts, guarded, open_objective
from .results.objective import task_scales
from .scores import ContextScore, Job
from .session import Session
from .study.settings import SearchConfig
from .tasks.make import make_tasks
from .tasks.mix import parts_of

if TYPE_CHECKING:
    from .gradient.objective import Objective

_TIMES_THREE = 4.0 / 3.0
"""How long a token of a step takes, of which a forward and backward counts three, in prefills."""


def why_not(settings: SearchConfig) -> str | None:
    """Return why derivatives cannot propose candidates here; None if they can, so far as is known before they do."""
    try:
        check_installed()
    except LropeError as error:
        return str(error)
    if settings.parametrization == "bezier":
        return "they propose factors of layers, and parametrization bezier searches curves alone"
    return None if settings.max_kl > 0.0 else "--max-kl 0 leaves them no room"


def tokens_of_step(session: Session, scores: Sequence[ContextScore]) -> int:
    """Return about how many tokens a step takes, by the scores of a context of each task."""
    texts = session.facts.guard_texts
    assert texts is not None  # a search's evaluators have a guard
    of_texts = [len(text.tokens) for text in guarded(texts)]
    return 3 * (sum(score.n_tokens for score in scores) + sum(of_texts) // len(of_texts))


def seconds_of_step(session: Session, scores: Sequence[ContextScore]) -> float:
    """Return about how long that takes; see `tokens_of_step`."""
    each = math.fsum(score.seconds for score in scores) / sum(score.n_tokens for score in scores)
    return _TIMES_THREE * each * tokens_of_step(session, scores)


@contextmanager
def climber(session: Session, settings: SearchConfig, *, begun: bool) -> Iterator[Climb]:
    """Open the model a second time, where it is differentiated, and yield what makes the steps.

    Before the first step (``begun``: it was made) the replay is held against llama.cpp's own scores, and how the tasks'
    derivatives agree is said.

    Raises `LropeError`: a package is missing, the model cannot be replayed, its replay disagrees, or memory is short.
    """
    mix, facts = session.mix, session.facts
    base = (1.0,) * session.n_layer
    scores = [session.score(Job(base, "search", i)) for i in range(settings.n_contexts("search"))]
    scales = task_scales(scores)
    n_tasks, names = len(mix.parts), [config.name for config in mix.tasks]
    given = [settings.started(start) for start in settings.start[: settings.gradient_starts]]
    starts = [start if isinstance(start, tuple) else tuple(start.factors(session.n_layer).tolist()) for start in given]
    assert facts.guard_texts is not None  # a search's evaluators have a guard
    with open_objective(session.model) as objective:
        if not begun:
            _check(session, objective, scores[:n_tasks], names)
        yield Climb(
            objective,
            _contexts(session, settings),
            names=names,
            weights=[weight for _, weight in mix.parts],
            scales=[scales[score.task] for score in scores[:n_tasks]],
            texts=guarded(facts.guard_texts),
            layers=facts.layers,
            config=AscentConfig(
                steps=settings.gradient_steps,
                visits=settings.gradient_visits,
                low=math.log(settings.bounds[0]),
                high=math.log(settings.bounds[1]),
                max_divergence=settings.max_kl,
            ),
            starts=[*starts, *[None] * (settings.gradient_starts - len(starts))],
            scale=settings.scale,
            seed=settings.seed,
            middle_weight=settings.middle_weight,
        )


def _contexts(session: Session, settings: SearchConfig) -> list[Callable[[int], Encoding]]:
    """Return what gives each task's context for a step, from 1.

    Search contexts that compare no candidates come first; where the task has no more of them, all take turns.
    """
    parts = parts_of(make_tasks(session.mix))
    n_tasks, n_searched = len(parts), settings.n_contexts("search")

    def context(task: int, step: int) -> Encoding:
        size = parts[task].size("search")
        index = len(range(task, n_searched, n_tasks)) + step - 1
        own = index if size is None else index % size
        return session.ask(partial(encode, "search", own * n_tasks + task))

    return [partial(context, task) for task in range(n_tasks)]


def _check(session: Session, objective: Objective, scores: Sequence[ContextScore], names: Sequence[str]) -> None:
    """Hold the replay against llama.cpp on a context of each task. Raises `LropeError`: they disagree."""
    from .gradient.objective import check_agrees

    at, gradients = np.zeros((session.n_layer, 1)), {}
    for name, score in zip(names, scores, strict=True):
        encoding = session.ask(partial(encode, score.split, score.index))
        found = objective.answers(encoding, at, differentiate=len(names) > 1)
        check_agrees(found.probes, score)
        gradients[name] = found.factors.sum(1)[list(session.facts.layers)]
    if len(names) > 1:
        width = max(map(len, names))
        session.progress.line("cosines between the tasks' gradients at the base model (below 0: opposite aims):")
        for name, row in zip(names, conflicts(gradients), strict=True):
            session.progress.line(f"  {name:<{width}}  " + "  ".join(f"{value:+.2f}" for value in row))
