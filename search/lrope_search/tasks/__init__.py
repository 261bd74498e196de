"""Tasks: long contexts with questions at known depths. They know nothing of models.

A task is made of files or of a seed alone; to fit its contexts into a number of tokens it is given a function that
counts them (`TokenLimit`).
"""

from ..config import SPLITS
from .counting import CommonWordsTask, FrequentWordsTask
from .identifiers import IDENTIFIERS, Identifiers
from .jsonl import JsonlTask
from .kv import KeyValueTask
from .make import file_identity, make_task, make_tasks, task_identity
from .mdqa import MultiDocumentTask
from .mix import AnyTask, MixedTask, mixed, parts_of
from .needles import MultiKeyTask
from .sizing import Count, TokenLimit
from .task import Task
from .variables import VariableTask

__all__ = [
    "IDENTIFIERS",
    "SPLITS",
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
    "TokenLimit",
    "VariableTask",
    "file_identity",
    "make_task",
    "make_tasks",
    "mixed",
    "parts_of",
    "task_identity",
]
