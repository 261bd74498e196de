"""A task from its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lrope_gguf.errors import LropeError

from ..config import DEFAULT_TEMPLATE, IDENTIFIER_KINDS, POSITIONS, TaskConfig, TaskMix, Tasks
from .counting import CommonWordsTask, FrequentWordsTask
from .jsonl import JsonlTask
from .kv import KeyValueTask
from .mdqa import MultiDocumentTask
from .mix import AnyTask, mixed
from .needles import MultiKeyTask
from .sizing import TokenLimit
from .task import Task
from .variables import VariableTask

_COUNTING = {task.name: task for task in (CommonWordsTask, FrequentWordsTask)}


def make_task(config: TaskConfig, count: Callable[[str], int] | None = None) -> Task:
    """Return the task; ``count`` tells how many tokens a prompt has, for contexts that are sized by tokens.

    Without it such contexts are as small as they can be: what is wrong with the settings shows without a model.

    Raises:
        LropeError: a file that cannot be used, or numbers that do not fit it.
    """
    tokens = config.context_tokens
    limit = None if tokens is None or count is None else TokenLimit(tokens, count)
    probes, positions = config.probes, config.positions or POSITIONS[0]
    keys, documents = config.keys, config.documents
    if tokens is not None and limit is None:
        keys = documents = probes or 1
    if config.name == "kv":
        kind = config.identifiers or IDENTIFIER_KINDS[0]
        return KeyValueTask(
            keys,
            probes=probes,
            positions=positions,
            seed=config.seed,
            data=config.data,
            identifiers=kind,
            limit=limit,
        )
    if config.name == "multikey":
        return MultiKeyTask(keys, probes=probes, positions=positions, seed=config.seed, limit=limit)
    if config.name == "vt":
        return VariableTask(config.lines, probes=probes, positions=positions, seed=config.seed, limit=limit)
    if config.name in _COUNTING:
        return _COUNTING[config.name](config.words, seed=config.seed, limit=limit)
    assert config.data is not None  # TaskConfig's own check
    if config.name == "mdqa":
        return MultiDocumentTask(
            config.data, documents, probes=probes, positions=positions, seed=config.seed, limit=limit
        )
    template = DEFAULT_TEMPLATE if config.prompt_template is None else config.prompt_template.replace("\\n", "\n")
    return JsonlTask(config.data, seed=config.seed, template=template)


def make_tasks(tasks: Tasks) -> AnyTask:
    """Return the task or the mix, as `make_task` makes each without a model.

    Raises:
        LropeError: see there.
    """
    return mixed([make_task(config) for config in TaskMix.of(tasks).tasks])


def task_identity(tasks: Tasks, leads: Sequence[str] = ()) -> dict[str, Any]:
    """Return what decides the questions, for a study's configuration: the settings, of a file its name and content.

    The tokenizer, by which ``context_tokens`` counts, is the model's, whose fingerprint stands beside this.

    Args:
        tasks: A task, or several, each of which then stands in ``parts`` with its weight.
        leads: What the base model writes before a value, of each task in the order of a mix; becomes ``answer_lead``.

    Raises:
        LropeError: a file cannot be read.
    """
    mix = TaskMix.of(tasks)
    parts: dict[str, dict[str, Any]] = {}
    for number, config in enumerate(mix.tasks):
        data = None if config.data is None else file_identity(config.data)
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
    """Return a file's name and content's hash, not where it lies: a study may move.

    Raises:
        LropeError: the file cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise LropeError(f"{path}: cannot be read ({error.strerror}); give another file") from None
