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
    from .identifiers import IDENTIFIERS
    from .jsonl import JsonlTask
    from .kv import KeyValueTask
    from .make import make_task, make_tasks, task_identity
    from .mdqa import MultiDocumentTask
    from .mix import MixedTask
    from .needles import MultiKeyTask
    from .sizing import TokenLimit
    from .task import Task
    from .variables import VariableTask

__all__ = [
    "IDENTIFIERS", "SPLITS", "CommonWordsTask", "FrequentWordsTask", "JsonlTask", "KeyValueTask", "MixedTask",
    "MultiDocumentTask", "MultiKeyTask", "Task", "TokenLimit", "VariableTask", "make_task", "make_tasks",
    "task_identity",
]  # fmt: skip
_MODULES = ("counting", "identifiers", "jsonl", "kv", "make", "mdqa", "mix", "needles", "sizing", "task", "variables")


def __getattr__(name: str) -> Any:
    for module in _MODULES if name in __all__ else ():
        found = import_module(f"{__name__}.{module}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
