"""Tasks: long contexts with questions at known depths. They know nothing of models.

A task is made of files or of a seed alone; to fit its contexts into a number of tokens it is given a function that
counts them (`TokenLimit`).
"""

from ..sample import SPLITS
from .counting import CommonWordsTask, FrequentWordsTask
from .identifiers import IDENTIFIERS
from .jsonl import JsonlTask
from .kv import KeyValueTask, NumberPairsTask, WordPairsTask
from .make import make_task, make_tasks, task_identity
from .mdqa import MultiDocumentTask
from .mix import MixedTask
from .needles import MultiKeyTask
from .sizing import TokenLimit
from .task import Task
from .variables import VariableTask

__all__ = [
    "IDENTIFIERS", "SPLITS", "CommonWordsTask", "FrequentWordsTask", "JsonlTask", "KeyValueTask", "MixedTask",
    "MultiDocumentTask", "MultiKeyTask", "NumberPairsTask", "Task", "TokenLimit", "VariableTask", "WordPairsTask",
    "make_task", "make_tasks", "task_identity",
]  # fmt: skip
