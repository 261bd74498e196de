"""What a search and a measurement begin with: workers, and the identity of what they keep on disk."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

from lrope_gguf import __version__
from lrope_gguf.errors import LropeError
from lrope_gguf.model_info import ModelInfo
from lrope_gguf.text import command_line

from .evaluation.binding import binding_version
from .evaluation.make import EvaluatorSpec, Facts
from .evaluation.settings import ModelConfig
from .machine import physical_cores, visible_gpus
from .scores import ContextScore
from .study.progress import Progress
from .study.store import Study
from .tasks.make import task_identity
from .tasks.settings import TaskMix
from .workers.processes import ProcessExecutor
from .workers.protocol import Executor, LocalExecutor
from .workers.ray_cluster import RayExecutor
from .workers.settings import WorkersConfig

_SAME = 1e-3  # nats: a result that differs by less from another version's is the same


def identity(info: ModelInfo, model: ModelConfig, mix: TaskMix, facts: Facts) -> dict[str, Any]:
    """Return all that decides an evaluation, as ``config.json`` of a `Study` holds it."""
    options = model.llama_options()
    return {
        "model": {"fingerprint": info.fingerprint(), "architecture": info.architecture, "name": info.name},
        "task": task_identity(mix, facts.leads) | {"chat_template": model.chat_template},
        "computing": {"batch_size": facts.batch_size, "n_gpu_layers": model.n_gpu_layers}
        | ({} if facts.scoring == "host" else {"scoring": facts.scoring}),  # nothing: as in older studies
        "versions": {"lrope-gguf": __version__, "llama-cpp-python": binding_version()},
    } | ({"llama_options": options} if options else {})


def check_versions(study: Study, first: Executor, progress: Progress) -> None:
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


def first_worker(workers: WorkersConfig, spec: EvaluatorSpec, stack: ExitStack) -> Executor:
    """Return an executor of one worker, which finds out what all of them need."""
    n_threads = spec.model.n_threads
    if workers.executor == "ray":
        return stack.enter_context(RayExecutor(spec, 1, address=workers.ray_address, n_threads=n_threads))
    if (workers.n_workers or 1) == 1 and not workers.gpus:
        return LocalExecutor(stack.enter_context(spec(n_threads)))
    gpus = workers.gpus or visible_gpus()
    return stack.enter_context(ProcessExecutor(spec, 1, n_threads=n_threads, gpus=gpus[:1]))


def all_workers(workers: WorkersConfig, spec: EvaluatorSpec, first: Executor, stack: ExitStack) -> Executor:
    """Return the executor of all: the first worker itself if one is all."""
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
