"""A session: the one opening of a search and of a measurement, from a model's path to workers and a study."""

from __future__ import annotations

import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from lrope_gguf import __version__
from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import ModelInfo, read_model
from lrope_gguf.text import command_line

from .cost import check_memory, memory_text
from .evaluation.binding import binding_version
from .evaluation.evaluator import Facts
from .evaluation.make import EvaluatorSpec, find_out, kept_computing, kept_guard_texts, use_threads
from .evaluation.parallel import Parallelism, divisions, fastest
from .evaluation.settings import ModelConfig
from .machine import free_memory, physical_cores, visible_gpus
from .scores import ContextScore, Evaluator, Job
from .study.interrupt import one_interrupt
from .study.progress import Progress
from .study.store import Study, holds_search
from .tasks.make import task_identity
from .tasks.settings import TaskMix, Tasks
from .workers.processes import ProcessExecutor
from .workers.protocol import Executor, LocalExecutor
from .workers.ray_cluster import RayExecutor
from .workers.settings import WorkersConfig

Purpose: TypeAlias = Literal["search", "measurement"]
Show: TypeAlias = bool | Callable[[str], None]
"""What becomes of progress: True shows it on the standard error, False nowhere, a function gets each line."""

T = TypeVar("T")

_START_SECONDS = 1.5  # until another process is ready, roughly
_SAME = 1e-3  # nats: a result that differs by less from another version's is the same


@dataclass
class Session:
    """A loaded model, its tasks, and the study of both.

    Attributes:
        info: Of the model's file.
        model: How the model is run.
        mix: What it is asked.
        facts: What only the loaded model could say.
        study: Keeps results.
        progress: Shows lines to people and logs them.
    """

    info: ModelInfo
    model: ModelConfig
    mix: TaskMix
    facts: Facts
    study: Study
    progress: Progress
    _workers: WorkersConfig
    _first: Executor
    _of_first: ExitStack
    _stack: ExitStack
    _spec: EvaluatorSpec
    _free: int | None
    _division: Parallelism = field(init=False)

    @property
    def n_layer(self) -> int:
        """Number of layers of the model, the length of ``factors``."""
        return self._first.n_layer

    def ask(self, function: Callable[[Evaluator], T]) -> T:
        """Return what ``function`` finds out from the first worker's evaluator; see `Executor.ask`."""
        return self._first.ask(function)

    def score(self, job: Job) -> ContextScore:
        """Return the score of a job that does not concern the guard, from the study or from the first worker."""
        score = self.study.lookup(job)
        if score is None:
            self._first.submit(job)
            _, score = self._first.next()
            self.study.record(job, score)
        assert isinstance(score, ContextScore)
        return score

    def divide(self, n_evaluations: int, most: int) -> float:
        """Settle how many workers do about ``n_evaluations`` evaluations, ``most`` at once, and say so.

        Returns how many times as fast as the first worker they are. Raises `LropeError`: the workers that were asked
        for do not fit into memory.
        """
        rates, n_asked = self.facts.rates, self._workers.n_workers
        alone = Parallelism(1, self.facts.n_threads)
        n_workers = n_asked or 1
        if self._workers.executor == "ray":
            self._division = Parallelism(n_workers, alone.n_threads)
            return float(n_workers)
        gpus = _gpus(self._workers)
        if not gpus and n_asked is not None:
            check_memory(self.facts.memory, n_workers, self._free)
        possible = {division: rate for division, rate in rates.items() if self._may_have(division, most)}
        if possible:
            n_tokens = max(1, n_evaluations * self.facts.n_tokens)
            self._division = fastest(possible, start_seconds=_START_SECONDS, n_tokens=n_tokens)
        else:
            share = max(1, (self.model.n_threads or physical_cores()) // n_workers)
            self._division = Parallelism(n_workers, share)
        if len(possible) > 1:
            listed = ", ".join(f"{rate:.0f} by {division}" for division, rate in rates.items())
            self.progress.line(f"fastest here and now: {self._division} (tokens a second: {listed})")
        self.progress.line(memory_text(self.facts.memory, self._division.n_workers))
        if self._division in rates:
            return rates[self._division] / rates[alone]
        if gpus:
            return float(min(n_workers, len(gpus)))
        if n_workers > physical_cores():
            self.progress.line(f"{n_workers} workers on {physical_cores()} cores: fewer would be faster (--workers)")
        return max(1.0, min(n_workers, physical_cores()) / alone.n_threads)

    def _may_have(self, division: Parallelism, most: int) -> bool:
        n_workers = division.n_workers
        if self._workers.n_workers is not None:
            return n_workers == self._workers.n_workers
        if n_workers == 1:
            return True
        fits = self._free is None or self.facts.memory.of_workers(n_workers) <= self._free
        return n_workers <= most and fits and not multiprocessing.current_process().daemon

    def executor(self) -> Executor:
        """Return who does the work, as `divide` has settled: the first worker itself if one is all."""
        n_workers, n_threads = self._division.n_workers, self._division.n_threads
        spec, workers = self._spec.settled(self.facts), self._workers
        if workers.executor == "local" and n_workers == 1:
            if n_threads != self.facts.n_threads:
                self._first.ask(partial(use_threads, n_threads))
            return self._first
        self._of_first.close()
        if workers.executor == "ray":
            address, asked = workers.ray_address, self.model.n_threads
            executor = RayExecutor(spec, workers.n_workers, address=address, n_threads=asked)
            return self._stack.enter_context(executor)
        gpus = _gpus(workers)
        return self._stack.enter_context(ProcessExecutor(spec, n_workers, n_threads=n_threads, gpus=gpus))


@contextmanager
def open_session(
    model: ModelConfig,
    task: Tasks,
    workers: WorkersConfig | None,
    directory: Path | None,
    purpose: Purpose,
    *,
    guard_text: str | None = None,
    bind: Callable[[Facts, Executor], Mapping[str, Any]],
    dry_run: bool = False,
    progress: Show = True,
) -> Iterator[Session]:
    """Load the model, find out what all workers must agree on, and open the study.

    Args:
        model: The model and how it is run.
        task: What it is asked.
        workers: How many workers, and where; None: on this machine, the number that is fastest.
        directory: Of the study; None: a temporary one.
        purpose: A search's evaluators have a guard, and its studies are no measurement's.
        guard_text: File of the guard's text; None: the base model writes it.
        bind: Returns what the study is bound to beside model, tasks and computing, once the first worker knows the
            facts; what is wrong with the settings it may raise, before anything is kept.
        dry_run: A study that is not there yet is not begun.
        progress: See `Show`.

    Raises:
        LropeError: the model, the task or the workers cannot be used; see also `Study` and `check_versions`.
    """
    workers = workers or WorkersConfig()
    info = read_model(model.path)  # its messages on damaged files are the plainer ones
    mix = TaskMix.of(task)
    kept = None if directory is None else Study.kept(directory, "config")
    if purpose == "measurement" and kept is not None and holds_search(kept):
        raise LropeError(f"--study {directory}: holds a search; choose another directory")
    batch_size, scoring = kept_computing(kept)
    if model.batch_size is None:  # the default may have been another one, or another machine's
        model = replace(model, batch_size=batch_size)
    texts = None if directory is None else kept_guard_texts(Study.kept(directory, "guard"), directory)
    spec = EvaluatorSpec(model, mix, guard_text, texts, scoring, guarded=purpose == "search")
    if workers.executor == "local" and not _gpus(workers):
        choices = divisions(physical_cores(), workers.n_workers, model.n_threads)
        spec = replace(spec, choices=choices if len(choices) > 1 else ())
    free = free_memory()
    with one_interrupt(), ExitStack() as stack:
        of_first = stack.enter_context(ExitStack())
        first = _first_worker(workers, spec, of_first)
        facts = first.ask(find_out)
        config = _identity(info, model, mix, facts) | dict(bind(facts, first))
        place = directory
        if place is None or (dry_run and kept is None):  # no trace that would bind a later run
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrope-")))
        study = stack.enter_context(Study(place, config))
        shown = Progress(_lines(study, progress), quiet=progress is not True)
        check_versions(study, first, shown)
        if facts.longest > facts.n_ctx_train:
            shown.line(
                f"{model.path}: prompts have {facts.longest} tokens, but the model was trained on {facts.n_ctx_train}"
            )
        yield Session(info, model, mix, facts, study, shown, workers, first, of_first, stack, spec, free)


def _gpus(workers: WorkersConfig) -> tuple[str, ...]:
    """Return the GPUs of local workers."""
    return () if workers.executor == "ray" else workers.gpus or visible_gpus()


def _lines(study: Study, progress: Show) -> Callable[[str], None]:
    """Return what takes each line of progress."""
    if isinstance(progress, bool):
        return study.log

    def both(line: str) -> None:
        study.log(line)
        progress(line)

    return both


def _first_worker(workers: WorkersConfig, spec: EvaluatorSpec, stack: ExitStack) -> Executor:
    """Return an executor of one worker, which finds out what all of them need."""
    n_threads = spec.model.n_threads
    if workers.executor == "ray":
        return stack.enter_context(RayExecutor(spec, 1, address=workers.ray_address, n_threads=n_threads))
    n_workers, gpus = workers.n_workers or 1, _gpus(workers)
    share = None if n_threads is None else max(1, n_threads // n_workers)
    if workers.gpus or (gpus and n_workers > 1):
        return stack.enter_context(ProcessExecutor(spec, 1, n_threads=share, gpus=gpus[:1]))
    return LocalExecutor(stack.enter_context(spec(share)))


def _identity(info: ModelInfo, model: ModelConfig, mix: TaskMix, facts: Facts) -> dict[str, Any]:
    """Return all that decides an evaluation, as ``config.json`` of a `Study` holds it."""
    options = model.llama_options()
    leads = [str(lead) for lead in facts.leads]
    return {
        "model": {"fingerprint": info.fingerprint(), "architecture": info.architecture, "name": info.name},
        "task": task_identity(mix, leads) | {"chat_template": model.chat_template},
        "computing": {"batch_size": facts.batch_size, "n_gpu_layers": model.n_gpu_layers}
        | ({} if facts.scoring == "host" else {"scoring": facts.scoring}),  # nothing: as in older studies
        "versions": {"lrope-gguf": __version__, "llama-cpp-python": binding_version()},
    } | ({"llama_options": options} if options else {})


def check_versions(study: Study, first: Executor, progress: Progress) -> None:
    """Go on with a study that other versions began only where one of its results comes out the same now.

    Raises `LropeError`: it does not; says how to go on.
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
            f"{said}, and a result that was measured again differs by {apart:.2g} nats; install the old versions "
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
