"""The search: candidates on search contexts, the winner on validation contexts, the gain on test contexts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..optimizers.protocol import Optimizer
from ..workers.protocol import Executor
from .conclude import SearchOutcome, conclude
from .explore import Exploration
from .plan import make_optimizer, most_candidates, planned_evaluations
from .progress import Progress
from .scheduler import Urgency
from .settings import SearchConfig
from .state import Run
from .store import Study


def run_search(
    executor: Executor,
    study: Study,
    settings: SearchConfig,
    progress: Progress,
    *,
    algorithm: Optimizer | None = None,
    architecture: str | None = None,
    block_count: int | None = None,
    guard_contexts: int = 0,
    rope: Mapping[str, Any] | None = None,
    test_size: int | None = None,
    ascent: Mapping[str, Any] | None = None,
    begun: float | None = None,
) -> SearchOutcome:
    """Search for a curve that beats the base model, and measure its gain honestly.

    Candidates are compared on the ``search`` contexts only; the winner among the best of them, the best
    uniform factor and the base model is chosen on ``validation`` contexts, unless its divergence on ordinary text
    (``guard``) exceeds ``settings.max_kl``; what is reported comes from ``test`` contexts. Meanwhile ``best.json`` of
    the study holds the best curve so far.

    There are no generations and no waiting at the end of a phase: candidate ``k`` is asked for as soon as all up to
    ``k - lag`` were told, and workers that this leaves idle do what will be needed later. The result depends on the
    settings, the model and the task, not on the number of workers nor on the order in which they return results, and
    not on how often the search was killed and resumed.

    Args:
        executor: Evaluates; stays open.
        study: Holds every result; its config goes into the provenance of ``best.json`` and has the tasks' weights.
        settings: How to search.
        progress: Shows how far it is.
        algorithm: Fresh optimizer in place of the one of the settings.
        architecture: The model's ``general.architecture``, for ``best.json``.
        block_count: The model's, for ``best.json``; None: ``executor.n_layer``.
        rope: How the base model rotates (`RopeScaling.json`), for ``best.json``.
        guard_contexts: 1 if the evaluator can measure the `divergence` from the base model, 0 if not.
        test_size: Test contexts that the task has, which `Looks` shares out; None: as many as wanted.
        ascent: What went before, for ``best.json`` (`Trail.summary`).
        begun: When (`time.monotonic`), for ``max_hours``; None: now.

    Raises:
        LropeError: the base model's log-probabilities are not finite, an evaluation failed, or the study cannot be
            written.
    """
    algorithm = algorithm or make_optimizer(settings, executor.n_layer)
    more = rope, test_size, ascent, begun
    run = Run(executor, study, settings, progress, architecture, block_count, guard_contexts, *more)
    planned = planned_evaluations(settings, guard=bool(guard_contexts), n_tasks=run.n_tasks)
    progress.start(sum(planned.values()))
    parts = ", ".join(f"{n} {split}" for split, n in planned.items())
    progress.line(f"up to {most_candidates(settings)} candidates: about {parts} evaluations of one context each")
    try:
        study.begin_candidates()
        run.pipeline.want(run.jobs(run.identity, "search"), order=-1)
        for order, split in enumerate(("validation", "test")):
            run.pipeline.want(run.jobs(run.identity, split), Urgency.SOON, order)
        return conclude(run, Exploration(run).search(algorithm))
    except KeyboardInterrupt:
        progress.line(_interrupted(run))
        raise
    finally:
        progress.close()


def _interrupted(run: Run) -> str:
    """What there is to say after Ctrl-C."""
    best = run.better_than_base()
    found = "none better than the base model"
    if best:
        found = f"the best so far, {best[0][1]:+.4f} {run.unit}, is {run.study.directory / 'best.json'}"
    return f"stopped after {len(run.ranking)} candidates, {found}; the same command resumes"
