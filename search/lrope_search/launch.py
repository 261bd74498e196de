"""A whole search: model, task and settings in, a study and its outcome out. Puts the rooms together."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import ModelInfo, read_model

from .cost import check_memory, duration, memory_text, precision
from .evaluation.make import EvaluatorSpec, Facts, find_out, kept_computing, kept_guard_texts
from .evaluation.settings import ModelConfig
from .machine import free_memory, physical_cores, visible_gpus
from .optimizers.protocol import Optimizer
from .report.page import write_report
from .results.summary import StudySummary
from .results.variation import components
from .sample import SPLITS
from .scores import ContextScore, Job
from .start import all_workers, check_versions, first_worker, identity
from .study.interrupt import one_interrupt
from .study.plan import make_optimizer, planned_evaluations
from .study.progress import Progress
from .study.run import SearchOutcome, run_search
from .study.settings import SearchConfig
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
) -> SearchOutcome:
    """Search layer factors for a model and a task, in a study that a later call with the same settings resumes.

    Progress goes to the standard error, and with everything else into ``directory``.

    Example:
        >>> from lrope_search import ModelConfig, SearchConfig, search, task_config
        >>> outcome = search(
        ...     ModelConfig("model.gguf"), task_config("kv", keys=100), SearchConfig(max_evaluations=80), "my.study"
        ... )  # doctest: +SKIP
        >>> outcome.best.save("best.json")  # doctest: +SKIP

    Args:
        model: The model and how it is run.
        task: What it is asked; several tasks, with their weights, are asked by turns.
        settings: How to search.
        directory: Of the study (`Study`); made if it is missing.
        workers: Who does the work; None: one worker in this process.

    Raises:
        LropeError: see `run_search`, `Study` and the settings.
    """
    outcome = _launch(model, task, settings, Path(directory), workers or WorkersConfig(), dry_run=False)
    assert outcome is not None
    return outcome


def estimate(
    model: ModelConfig,
    task: Tasks,
    settings: SearchConfig,
    directory: str | os.PathLike[str],
    *,
    workers: WorkersConfig | None = None,
) -> None:
    """Say on the standard error what `search` would cost, by one evaluation of the base model; arguments as there.

    A study that is not there yet is not begun.
    """
    _launch(model, task, settings, Path(directory), workers or WorkersConfig(), dry_run=True)


def _launch(
    model: ModelConfig,
    task: Tasks,
    settings: SearchConfig,
    directory: Path,
    workers: WorkersConfig,
    *,
    dry_run: bool,
) -> SearchOutcome | None:
    info = read_model(model.path)
    if not info.has_rope:
        raise LropeError(f"{info.path}: a model without RoPE; layer factors mean nothing to it")
    _layers(info, 1)
    for start in settings.start:
        if not isinstance(start[0], tuple) and len(start) != info.n_layer:
            raise LropeError(f"--start: {len(start)} factors, but {info.path} has {info.n_layer} layers; give another")
    mix = TaskMix.of(task)
    contexts = make_tasks(mix)
    sizes = {split: contexts.size(split) for split in SPLITS}
    for split, size in sizes.items():
        wanted = getattr(settings, f"{split}_contexts")
        if wanted is None:
            continue
        mix.check_contexts(f"{split}_contexts", wanted)
        if size is not None and wanted > size:
            raise LropeError(f"{split}_contexts {wanted}: the data has {size} for this; ask for fewer")
    guard = {"text": None if settings.guard_text is None else file_identity(settings.guard_text)}
    free = free_memory()
    texts = kept_guard_texts(Study.kept(directory, "guard"), directory)
    kept = Study.kept(directory, "config")
    batch_size, scoring = kept_computing(kept)
    if model.batch_size is None:  # the default may have been another one, or another machine's
        model = dataclasses.replace(model, batch_size=batch_size)
    spec = EvaluatorSpec(model, mix, settings.guard_text, texts, scoring)
    with one_interrupt(), ExitStack() as stack:
        first = first_worker(workers, spec, stack)
        facts = first.ask(find_out)
        layers = _layers(info, facts.longest)
        settings = settings.settled(facts.n_probes, sizes, len(mix.parts), kept)
        config = identity(info, model, mix, facts) | {"search": settings.identity(), "guard": guard}
        place = directory
        if dry_run and not (directory / "config.json").exists():  # no trace that would bind a later run
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrope-")))
        assert facts.guard_texts is not None  # a search's evaluators have a guard
        with Study(place, config) as study:
            study.keep("guard", dataclasses.asdict(facts.guard_texts))
            progress = Progress(study.log)
            check_versions(study, first, progress)
            if len(layers) < first.n_layer:
                progress.line(f"{len(layers)} of {first.n_layer} layers rotate over the whole context")
            optimizer = make_optimizer(settings, first.n_layer, layers)
            _say_cost(workers, optimizer, settings, study, directory, first, facts, free, progress, len(mix.parts))
            if dry_run:
                if len(mix.parts) == 1:
                    _say_variation(settings, study, first, facts, progress)
                return None
            executor = all_workers(workers, spec.settled(facts), first, stack)
            outcome = run_search(
                executor,
                study,
                settings,
                progress,
                algorithm=optimizer,
                architecture=info.architecture,
                block_count=info.block_count,
                guard_contexts=1,
                rope=info.rope.under(model.llama_options()).json(),
                test_size=sizes["test"],
            )
            progress.line(_report(outcome.summary))
            return outcome


def _say_variation(settings: SearchConfig, study: Study, first: Executor, facts: Facts, progress: Progress) -> None:
    """Measure, by the base model and a uniform factor, how far the questions tell candidates apart, and say so."""
    n_contexts = min(settings.n_contexts("search"), 2)
    factor = next((factor for factor in settings.uniform_factors if factor > 1.0), 1.05)
    base, other = (
        [_context_score(Job((side,) * first.n_layer, "search", i), study, first) for i in range(n_contexts)]
        for side in (1.0, factor)
    )
    found = components(base, other)
    if found is not None:
        for line in precision(found, settings.n_contexts("search"), facts, base[0].n_tokens, f"uniform {factor:g}"):
            progress.line(line)


def _context_score(job: Job, study: Study, first: Executor) -> ContextScore:
    """Return the score of a job that does not concern the guard, from the study or fresh."""
    score = study.lookup(job)
    if score is None:
        first.submit(job)
        _, score = first.next()
        study.record(job, score)
    assert isinstance(score, ContextScore)
    return score


def _layers(info: ModelInfo, n_tokens: int) -> tuple[int, ...]:
    """Return the layers that rotate over the whole of ``n_tokens`` tokens.

    Raises:
        LropeError: there is none.
    """
    layers = info.layers_reaching(n_tokens)
    if not layers:
        raise LropeError(
            f"{info.path}: none of its layers rotates over the whole of {n_tokens} tokens (sliding windows, layers "
            "without RoPE); layer factors can change nothing in the middle of such a context, ask for shorter ones"
        )
    return layers


def _report(summary: StudySummary) -> str:
    """Make the study's report; say where it is, or why there is none, for want of which no search fails."""
    try:
        return f"report: {write_report(summary)}"
    except LropeError as error:
        return f"no report: {error}"


def _say_cost(
    workers: WorkersConfig,
    optimizer: Optimizer,
    settings: SearchConfig,
    study: Study,
    directory: Path,
    first: Executor,
    facts: Facts,
    free: int | None,
    progress: Progress,
    n_tasks: int,
) -> None:
    """Say what the search will cost, by the base model on each task's first search context, which is needed anyway.

    Raises:
        LropeError: the workers do not fit into ``free`` bytes of memory.
    """
    n_workers = workers.n_workers or 1
    gpus = () if workers.executor == "ray" else workers.gpus or visible_gpus()
    if workers.executor == "local":
        if not gpus:
            check_memory(facts.memory, n_workers, free)
        progress.line(memory_text(facts.memory, n_workers))
    jobs = [Job((1.0,) * first.n_layer, "search", index) for index in range(n_tasks)]
    scores = [_context_score(job, study, first) for job in jobs]
    for score, sample in zip(scores, facts.samples, strict=True):
        if score.accuracy == 0.0:
            progress.line(sample.advice(len(score.probes)))
    n_tokens = sum(score.n_tokens for score in scores) / n_tasks
    seconds = sum(score.seconds for score in scores) / n_tasks
    # processors are divided between local workers: more of them are no faster in all
    side_by_side = n_workers if workers.executor == "ray" else min(n_workers, max(len(gpus), 1))
    n_evaluations = sum(planned_evaluations(settings, guard=True, n_tasks=n_tasks).values())
    hours = n_evaluations * seconds / 3600.0 / side_by_side
    on_each = " on each worker" if workers.executor == "ray" and workers.n_workers is None else ""
    progress.line(
        f"about {n_evaluations} evaluations of {n_tokens:.0f} tokens: about {duration(hours)} at "
        f"{side_by_side * n_tokens / max(seconds, 1e-9):.0f} tokens/s{on_each}; "
        f"results go to {directory}"
    )
    if workers.executor == "local" and not gpus and n_workers > physical_cores():
        progress.line(f"{n_workers} workers on {physical_cores()} processors: fewer would be faster (--workers)")
    if n_workers > optimizer.lag:
        progress.line(
            f"{n_workers} workers, but only {optimizer.lag} candidates out at once: some may idle; another lag "
            f"(--set {settings.optimizer.name}.lag={2 * n_workers}) keeps them busy, and finds another result"
        )
