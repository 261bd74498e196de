"""A whole search: model, task and settings in, a study and its outcome out. Puts the rooms together."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from lrope_gguf import __version__
from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import ModelInfo, read_model
from lrope_gguf.text import command_line

from .config import ModelConfig, SearchConfig, TaskMix, Tasks, WorkersConfig, option
from .cost import check_memory, duration, memory_text, precision
from .evaluation.binding import binding_version
from .evaluation.make import EvaluatorSpec, Facts, find_out, kept_computing, kept_guard_texts
from .machine import free_memory, physical_cores, visible_gpus
from .optimizers.protocol import Optimizer
from .report.page import write_report
from .results.summary import StudySummary
from .results.variation import components
from .scores import ContextScore, Job
from .study.interrupt import one_interrupt
from .study.plan import make_optimizer, planned_evaluations
from .study.progress import Progress
from .study.run import SearchOutcome, run_search
from .study.store import Study
from .tasks import SPLITS, file_identity, make_tasks, task_identity
from .workers.processes import ProcessExecutor
from .workers.protocol import Executor, LocalExecutor
from .workers.ray_cluster import RayExecutor

_SAME = 1e-3  # nats: a result that differs by less from another version's is the same


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
        >>> from lrope_search import ModelConfig, SearchConfig, TaskConfig, search
        >>> outcome = search(
        ...     ModelConfig("model.gguf"), TaskConfig("kv", keys=100), SearchConfig(max_evaluations=80), "my.study"
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
        mix.check_contexts(option(f"{split}_contexts"), wanted)
        if size is not None and wanted > size:
            raise LropeError(f"--{split}-contexts {wanted}: the data has {size} for this; ask for fewer")
    guard = {"text": None if settings.guard_text is None else file_identity(settings.guard_text)}
    free = free_memory()
    texts = kept_guard_texts(Study.kept(directory, "guard"), directory)
    batch_size, scoring = kept_computing(Study.kept(directory, "config"))
    if model.batch_size is None:  # the default may have been another one, or another machine's
        model = dataclasses.replace(model, batch_size=batch_size)
    spec = EvaluatorSpec(model, mix, settings.guard_text, texts, scoring)
    with one_interrupt(), ExitStack() as stack:
        first = _first_worker(workers, spec, stack)
        facts = first.ask(find_out)
        layers = _layers(info, facts.longest)
        settings = settings.settled(facts.n_probes, sizes, len(mix.parts))
        options = model.llama_options()
        config = {
            "model": {"fingerprint": info.fingerprint(), "architecture": info.architecture, "name": info.name},
            "task": task_identity(mix, facts.leads) | {"chat_template": model.chat_template},
            "search": settings.identity(),
            "guard": guard,
            "computing": {"batch_size": facts.batch_size, "n_gpu_layers": model.n_gpu_layers}
            | ({} if facts.scoring == "host" else {"scoring": facts.scoring}),  # nothing: as in older studies
            "versions": {"lrope-gguf": __version__, "llama-cpp-python": binding_version()},
        } | ({"llama_options": options} if options else {})
        place = directory
        if dry_run and not (directory / "config.json").exists():  # no trace that would bind a later run
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrope-")))
        with Study(place, config) as study:
            study.keep("guard", dataclasses.asdict(facts.guard_texts))
            progress = Progress(study.log)
            _check_versions(study, first, progress)
            if len(layers) < first.n_layer:
                progress.line(f"{len(layers)} of {first.n_layer} layers rotate over the whole context")
            optimizer = make_optimizer(settings, first.n_layer, layers)
            _say_cost(workers, optimizer, settings, study, directory, first, facts, free, progress, len(mix.parts))
            if dry_run:
                if len(mix.parts) == 1:
                    _say_variation(settings, study, first, facts, progress)
                return None
            spec = dataclasses.replace(
                spec,
                model=dataclasses.replace(model, batch_size=facts.batch_size),
                guard_texts=facts.guard_texts,
                scoring=facts.scoring,
            )
            executor = _all_workers(workers, spec, first, stack)
            outcome = run_search(
                executor,
                study,
                settings,
                progress,
                algorithm=optimizer,
                architecture=info.architecture,
                block_count=info.block_count,
                guard_contexts=1,
                rope=info.rope.under(options).json(),
            )
            progress.line(_report(outcome.summary))
            return outcome


def _check_versions(study: Study, first: Executor, progress: Progress) -> None:
    """Go on with a study that other versions began only where one of its results comes out the same now.

    Raises:
        LropeError: it does not; says how to go on.
    """
    if not study.changed_versions:
        return
    changes = [
        f"{name} was {old if isinstance(old, str) else 'absent'}, is {new if isinstance(new, str) else 'absent'}"
        for name, (old, new) in study.changed_versions.items()
    ]
    said = f"{study.directory}: begun with other versions ({', '.join(changes)})"
    results = [(job, score) for job, score in study.results.items() if isinstance(score, ContextScore)]
    if not results:
        progress.line(f"{said}; nothing was measured yet")
        return
    job, before = results[0]
    first.submit(job)
    _, now = first.next()
    assert isinstance(now, ContextScore)
    apart = _apart(before, now)
    if apart > _SAME:
        wanted = [f"{name}=={old}" for name, (old, _) in study.changed_versions.items() if isinstance(old, str)]
        raise LropeError(
            f"{said}, and what they measured comes out otherwise now ({apart:.2g} nats apart): go back to them "
            f"({command_line(['pip', 'install', *wanted])}) or choose another --study"
        )
    progress.line(f"{said}; one result was measured again and is the same, so the study goes on")


def _apart(one: ContextScore, other: ContextScore) -> float:
    """Return the largest difference of two scores' log-probabilities, in nats; infinite where the questions differ."""
    if [probe.depth for probe in one.probes] != [probe.depth for probe in other.probes]:
        return math.inf
    pairs = zip(one.probes, other.probes, strict=True)
    values = [(a.log_probability, b.log_probability) for a, b in pairs]
    return max((abs(a - b) for a, b in values if a != b), default=0.0)


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


def _first_worker(workers: WorkersConfig, spec: EvaluatorSpec, stack: ExitStack) -> Executor:
    """Return an executor of one worker, which finds out what all of them need."""
    n_threads = spec.model.n_threads
    if workers.executor == "ray":
        return stack.enter_context(RayExecutor(spec, 1, address=workers.ray_address, n_threads=n_threads))
    if (workers.n_workers or 1) == 1 and not workers.gpus:
        return LocalExecutor(stack.enter_context(spec(n_threads)))
    gpus = workers.gpus or visible_gpus()
    return stack.enter_context(ProcessExecutor(spec, 1, n_threads=n_threads, gpus=gpus[:1]))


def _all_workers(workers: WorkersConfig, spec: EvaluatorSpec, first: Executor, stack: ExitStack) -> Executor:
    """Return the executor of the search: the first worker itself if one is all."""
    n_threads, n_workers = spec.model.n_threads, workers.n_workers or 1
    if workers.executor == "ray":
        first.close()
        address = workers.ray_address
        return stack.enter_context(RayExecutor(spec, workers.n_workers, address=address, n_threads=n_threads))
    if n_workers == 1:
        return first
    first.close()
    share = max(1, (n_threads or physical_cores()) // n_workers)
    return stack.enter_context(ProcessExecutor(spec, n_workers, n_threads=share, gpus=workers.gpus or visible_gpus()))


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
        progress.line(f"{n_workers} workers, but only {optimizer.lag} candidates out at once: some will idle (--lag)")
