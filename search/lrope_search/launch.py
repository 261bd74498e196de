"""A whole search: model, task and settings in, a study and its outcome out. Puts the rooms together."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import ModelInfo, read_model

from .climbing import climber, seconds_of_step, tokens_of_step, why_not
from .cost import duration, precision
from .evaluation.evaluator import Facts
from .evaluation.make import check_factors
from .evaluation.settings import ModelConfig
from .optimizers.protocol import Optimizer
from .report.page import write_report
from .results.summary import StudySummary, section
from .results.variation import components
from .sample import SPLITS
from .scores import SCALES, Factors, Job, Tuned, rows_of, tuned
from .session import Session, Show, open_session
from .study.ascend import Climber, Trail, ascend
from .study.conclude import SearchOutcome
from .study.plan import make_optimizer, planned_evaluations
from .study.run import run_search
from .study.settings import SearchConfig, Start
from .study.store import Study
from .tasks.make import file_identity, make_tasks
from .tasks.settings import TaskMix, Tasks
from .workers.protocol import Executor
from .workers.settings import WorkersConfig


def search(
    model: ModelConfig,
    task: Tasks,
    settings: SearchConfig,
    directory: str | os.PathLike[str],
    *,
    workers: WorkersConfig | None = None,
    progress: Show = True,
) -> SearchOutcome:
    """Search layer factors for a model and a task, in a study that a later call with the same settings resumes.

    Progress goes, with everything else, into ``directory``.

    Example:
        >>> from lrope_search import ModelConfig, SearchConfig, search, task_config
        >>> outcome = search(
        ...     ModelConfig("model.gguf"), task_config("kv", keys=100), SearchConfig(max_evaluations=80), "my.study"
        ... )  # doctest: +SKIP
        >>> outcome.best.save("best.json")  # doctest: +SKIP

    Args:
        model: The model and how it is run.
        task: The task, or several with their weights, which take turns.
        settings: How to search.
        directory: Of the study (`Study`); made if it is missing.
        workers: How many workers, and where; None: on this machine, the number that is fastest.
        progress: True shows it on the standard error too, False does not; a function gets each line.

    Raises:
        LropeError: see `run_search`, `Study` and the settings.
    """
    outcome = _run(model, task, settings, Path(directory), workers, progress)
    assert outcome is not None  # of no dry run
    return outcome


def estimate(
    model: ModelConfig,
    task: Tasks,
    settings: SearchConfig,
    directory: str | os.PathLike[str],
    *,
    workers: WorkersConfig | None = None,
    progress: Show = True,
) -> None:
    """Say what `search` would cost, by one evaluation of the base model, and stop there; arguments as there.

    A study that is not there yet is not begun.
    """
    _run(model, task, settings, Path(directory), workers, progress, dry_run=True)


def _run(
    model: ModelConfig,
    task: Tasks,
    settings: SearchConfig,
    directory: Path,
    workers: WorkersConfig | None,
    progress: Show,
    *,
    dry_run: bool = False,
) -> SearchOutcome | None:
    """Open a session, say what the search will cost, and search; None of a dry run, which stops there."""
    info, mix = read_model(model.path), TaskMix.of(task)
    if not info.has_rope:
        raise LropeError(f"{info.path}: the model has no RoPE, so layer factors cannot change it")
    settings = dataclasses.replace(settings, start=tuple(_shaped(info, start) for start in settings.start))
    sizes, kept, begun = _sizes(mix, settings), Study.kept(directory, "config"), time.monotonic()
    guard = {"text": None if settings.guard_text is None else file_identity(settings.guard_text)}

    refused: str | None = None

    def settle(facts: Facts) -> SearchConfig:
        return settings.settled(facts.n_probes, sizes, len(mix.parts), kept)

    def bind(facts: Facts, first: Executor) -> dict[str, Any]:
        nonlocal settings, refused
        _layers(info, facts)
        settings, refused = _with_method(settings, kept)
        if settings.scale != SCALES[0]:
            begun_with = [start for start in settings.start if isinstance(start, Tuned)]
            first.ask(partial(check_factors, [_neutral(info, settings.scale), *begun_with]))
        return {"search": settle(facts).identity(), "guard": guard}

    with open_session(
        *(model, mix, workers, directory, "search"),
        guard_text=settings.guard_text,
        bind=bind,
        dry_run=dry_run,
        progress=progress,
    ) as session:
        facts, settled = session.facts, settle(session.facts)
        assert facts.guard_texts is not None  # a search's evaluators have a guard
        session.study.keep("guard", dataclasses.asdict(facts.guard_texts))
        layers = _layers(info, facts)
        if len(layers) < session.n_layer:
            session.progress.line(f"{len(layers)} of {session.n_layer} layers rotate over the whole context")
        if refused is not None:
            session.progress.line(refused)
        optimizer = make_optimizer(settled, session.n_layer, layers)
        _say_cost(session, settled, optimizer, directory, workers or WorkersConfig())
        if dry_run:
            if len(mix.parts) == 1:
                _say_variation(session, settled)
            return None
        trail = None
        if settled.ascends:
            trail = _ascend(session, settled, begun)
            proposals = trail.proposals(settled.bounds)
            if not proposals:
                if settled.scale != SCALES[0]:
                    session.progress.line("no head is scaled; the search goes on with factors of layers")
                settled = settled.of_layers()
            optimizer = make_optimizer(settled, session.n_layer, layers, proposals)
        outcome = run_search(
            session.executor(),
            session.study,
            settled,
            session.progress,
            algorithm=optimizer,
            architecture=info.architecture,
            block_count=info.block_count,
            guard_contexts=1,
            rope=info.rope.under(model.llama_options()).json(),
            test_size=sizes["test"],
            ascent=None if trail is None else trail.summary(),
            begun=begun,
        )
        session.progress.line(_report(outcome.summary))
        return outcome


def _shaped(info: ModelInfo, start: Start) -> Start:
    """Return a start with a number for each layer and head. Raises `LropeError`: it is of another model."""
    if isinstance(start[0], tuple):
        return start
    if len(start) != info.n_layer:
        raise LropeError(f"--start: {len(start)} factors, but {info.path} has {info.n_layer} layers; give another")
    try:
        rows = {name: info.shaped_rows(name, of_heads)[: len(start)] for name, of_heads in rows_of(start).items()}
    except LropeError as error:
        raise LropeError(f"--start: {error}") from None
    return tuned(start, rows)


def _neutral(info: ModelInfo, scale: str) -> Factors:
    """Return factors that change nothing, of all that a search of this scale may change.

    Raises `LropeError`: the file does not tell how many heads there are, or they can have none of their own.
    """
    n_layer = info.n_layer or 0
    wanted = {"head_factors": info.n_head_kv, "query_scales": info.n_head}
    names = [
        name
        for name, scales in (("head_factors", ("heads", "both")), ("query_scales", ("queries", "both")))
        if scale in scales
    ]
    rows = {name: tuple((1.0,) * n for n in (wanted[name] or ())[:n_layer]) for name in names}
    try:
        return tuned(
            (1.0,) * n_layer, {name: info.shaped_rows(name, of_heads)[:n_layer] for name, of_heads in rows.items()}
        )
    except LropeError as error:
        raise LropeError(f"--set scale={scale}: {error}") from None


def _with_method(settings: SearchConfig, kept: Any) -> tuple[SearchConfig, str | None]:
    """Return the settings with a method: what was asked for, else the study's, else the best that there is here.

    And why that is another one. A study that was begun with derivatives goes on with them.

    Raises `LropeError`: heads are to be scaled, which only derivatives can.
    """
    begun = None if kept is None else section(kept, "search").get("method", "genetic")
    wanted = settings.method or begun or ("both" if settings.optimizer.name == "ga" else "genetic")
    of_heads = settings.scale != SCALES[0]
    if of_heads and wanted == "genetic":
        raise LropeError(f"--set scale={settings.scale}: only derivatives scale heads; give --method gradient")
    refused = None if wanted in ("genetic", begun) else why_not(settings)
    if of_heads and refused:
        raise LropeError(f"--set scale={settings.scale}: needs derivatives: {refused}")
    if of_heads:
        told = "no genetic search, which knows factors of layers alone" if settings.method == "both" else None
        return dataclasses.replace(settings, method="gradient"), told
    told = refused and f"without gradients: {refused}"
    return dataclasses.replace(settings, method="genetic" if refused else wanted), told


def _ascend(session: Session, settings: SearchConfig, begun: float) -> Trail:
    """Make the steps that follow derivatives, those that the study lacks, in at most half of the time that there is."""
    until = math.inf if settings.max_hours is None else begun + 1800.0 * settings.max_hours
    made = bool(Trail.of(session.study.directory).steps)

    def opened() -> AbstractContextManager[Climber]:
        return climber(session, settings, begun=made)

    return ascend(session.study, settings.n_steps, opened, session.progress, until=until)


def _sizes(mix: TaskMix, settings: SearchConfig) -> dict[str, int | None]:
    """Return how many contexts each split has; None: as many as wanted.

    Raises `LropeError`: the settings ask for more of one, or the tasks cannot be made.
    """
    contexts = make_tasks(mix)
    sizes = {split: contexts.size(split) for split in SPLITS}
    for split, size in sizes.items():
        wanted = getattr(settings, f"{split}_contexts")
        if wanted is None:
            continue
        mix.check_contexts(f"{split}_contexts", wanted)
        if size is not None and wanted > size:
            raise LropeError(f"{split}_contexts {wanted}: the data has only {size}; ask for fewer")
    return sizes


def _say_cost(
    session: Session, settings: SearchConfig, optimizer: Optimizer, directory: Path, workers: WorkersConfig
) -> None:
    """Say what the search will cost, by the base model on each task's first search context, which is needed anyway.

    Raises `LropeError`: the workers do not fit into memory.
    """
    facts, progress, n_tasks = session.facts, session.progress, len(session.mix.parts)
    n_evaluations = sum(planned_evaluations(settings, guard=True, n_tasks=n_tasks).values())
    times = session.divide(max(0, n_evaluations - len(session.study)), optimizer.lag)
    scores = [session.score(Job((1.0,) * session.n_layer, "search", index)) for index in range(n_tasks)]
    for score, sample in zip(scores, facts.samples, strict=True):
        if score.accuracy == 0.0:
            progress.line(sample.advice(len(score.probes)))
    n_tokens = sum(score.n_tokens for score in scores) / n_tasks
    seconds = sum(score.seconds for score in scores) / n_tasks / times
    on_each = " on each worker" if workers.executor == "ray" and workers.n_workers is None else ""
    steps, of_steps, before = settings.n_steps, 0.0, ""
    if steps:
        of_steps = steps * seconds_of_step(session, scores)
        before = f"{steps} steps of gradients, {steps * tokens_of_step(session, scores):,} tokens, and "
    takes = duration((n_evaluations * seconds + of_steps) / 3600.0)
    progress.line(
        f"about {before}{n_evaluations} evaluations of {n_tokens:.0f} tokens: about {takes} "
        f"at {n_tokens / max(seconds, 1e-9):.0f} tokens/s{on_each}; results go to {directory}"
    )
    if (workers.n_workers or 1) > optimizer.lag:
        progress.line(
            f"{workers.n_workers} workers, but only {optimizer.lag} candidates run at once, so some may idle; "
            f"--set {settings.optimizer.name}.lag={2 * (workers.n_workers or 1)} keeps them busy and changes the result"
        )


def _say_variation(session: Session, settings: SearchConfig) -> None:
    """Measure, by the base model and a uniform factor, how far the questions tell candidates apart, and say so."""
    n_contexts = min(settings.n_contexts("search"), 2)
    factor = next((factor for factor in settings.uniform_factors if factor > 1.0), 1.05)
    base, other = (
        [session.score(Job((side,) * session.n_layer, "search", i)) for i in range(n_contexts)]
        for side in (1.0, factor)
    )
    found = components(base, other)
    if found is not None:
        n_search, n_tokens = settings.n_contexts("search"), base[0].n_tokens
        for line in precision(found, n_search, session.facts, n_tokens, f"uniform {factor:g}"):
            session.progress.line(line)


def _layers(info: ModelInfo, facts: Facts) -> tuple[int, ...]:
    """Return the layers that rotate over the whole of the longest prompt. Raises `LropeError`: there is none."""
    if not facts.layers:
        raise LropeError(
            f"{info.path}: no layer rotates over a whole context of {facts.longest} tokens (sliding windows, "
            "layers without RoPE), so layer factors cannot change what is found far back; give shorter contexts"
        )
    return facts.layers


def _report(summary: StudySummary) -> str:
    """Make the study's report; say where it is, or why there is none, since no search fails for lack of one."""
    try:
        return f"report: {write_report(summary)}"
    except LropeError as error:
        return f"no report: {error}"
