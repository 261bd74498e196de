"""Tasks: long contexts with questions at known depths. They know nothing of models.

A task is made of files or of a seed alone; to fit its contexts into a number of tokens it is given a function that
counts them (`TokenLimit`).
"""

from .identifiers import IDENTIFIERS, Identifiers
from .jsonl import DEFAULT_TEMPLATE, JsonlTask
from .kv import DEFAULT_PAIRS, KeyValueTask
from .mdqa import DEFAULT_DOCUMENTS, MultiDocumentTask
from .sizing import Count, TokenLimit
from .task import DEFAULT_DEPTHS, SPLITS, Task

__all__ = [
    "DEFAULT_DEPTHS",
    "DEFAULT_DOCUMENTS",
    "DEFAULT_PAIRS",
    "DEFAULT_TEMPLATE",
    "IDENTIFIERS",
    "SPLITS",
    "Count",
    "Identifiers",
    "JsonlTask",
    "KeyValueTask",
    "MultiDocumentTask",
    "Task",
    "TokenLimit",
]
