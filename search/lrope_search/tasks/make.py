"""A task from its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError

from .mix import AnyTask, mixed
from .settings import TaskConfig, TaskMix, Tasks
from .sizing import Count
from .task import Task


def make_task(config: TaskConfig, count: Count | None = None) -> Task:
    """Return the task of its settings; see `TaskConfig.make`. Raises `LropeError`: they do not fit the file."""
    return config.make(count)


def make_tasks(tasks: Tasks) -> AnyTask:
    """Return the task or the mix, as `make_task` makes each without a model."""
    return mixed([make_task(config) for config in TaskMix.of(tasks).tasks])


def task_identity(tasks: Tasks, leads: Sequence[str] = ()) -> dict[str, Any]:
    """Return what decides the questions, for a study's configuration: the settings, of a file its name and content.

    The tokenizer, by which ``context_tokens`` counts, is the model's, whose fingerprint stands beside this. Raises
    `LropeError`: a file cannot be read.

    Args:
        tasks: A task, or several, each of which then stands in ``parts`` with its weight.
        leads: What the base model writes before a value, of each task in the order of a mix; becomes ``answer_lead``.
    """
    mix = TaskMix.of(tasks)
    parts: dict[str, dict[str, Any]] = {}
    for number, config in enumerate(mix.tasks):
        data = None if config.file is None else file_identity(config.file)
        parts[config.name] = config.to_json() | {"data": data}
        if leads:
            parts[config.name]["answer_lead"] = leads[number]
    if not mix.weights:
        return parts.popitem()[1]
    return {
        "name": "+".join(parts),
        "parts": {name: parts[name] | {"weight": weight} for name, weight in mix.weights.items()},
    }


def file_identity(path: Path | str) -> str:
    """Return a file's name and content's hash, not where it lies: a study may move. Raises `LropeError`: unreadable."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise LropeError(f"{path}: cannot be read ({error.strerror}); give another file") from None
