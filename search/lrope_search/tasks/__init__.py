"""Tasks: long contexts with questions at known depths. They know nothing of models.

A task is made of files or of a seed alone; to fit its contexts into a number of tokens it is given a function that
counts them (`TokenLimit`). Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..sample import SPLITS
    from .counting import CommonWordsTask, FrequentWordsTask
    from .identifiers import IDENTIFIERS, Identifiers
    from .jsonl import JsonlTask
    from .kv import KeyValueTask
    from .make import file_identity, make_task, make_tasks, task_identity
    from .mdqa import MultiDocumentTask
    from .mix import AnyTask, MixedTask, mixed, parts_of
    from .needles import MultiKeyTask
    from .settings import TASKS, Count, TaskConfig, TaskMix, Tasks
    from .sizing import TokenLimit
    from .task import Task
    from .variables import VariableTask

_WHERE = {
    "counting": ("CommonWordsTask", "FrequentWordsTask"),
    "identifiers": ("IDENTIFIERS", "Identifiers"),
    "jsonl": ("JsonlTask",),
    "kv": ("KeyValueTask",),
    "make": ("file_identity", "make_task", "make_tasks", "task_identity"),
    "mdqa": ("MultiDocumentTask",),
    "mix": ("AnyTask", "MixedTask", "mixed", "parts_of"),
    "needles": ("MultiKeyTask",),
    "settings": ("TASKS", "Count", "TaskConfig", "TaskMix", "Tasks"),
    "sizing": ("TokenLimit",),
    "task": ("SPLITS", "Task"),
    "variables": ("VariableTask",),
}

__all__ = [
    "IDENTIFIERS",
    "SPLITS",
    "TASKS",
    "AnyTask",
    "CommonWordsTask",
    "Count",
    "FrequentWordsTask",
    "Identifiers",
    "JsonlTask",
    "KeyValueTask",
    "MixedTask",
    "MultiDocumentTask",
    "MultiKeyTask",
    "Task",
    "TaskConfig",
    "TaskMix",
    "Tasks",
    "TokenLimit",
    "VariableTask",
    "file_identity",
    "make_task",
    "make_tasks",
    "mixed",
    "parts_of",
    "task_identity",
]


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
