"""Data files of tasks, made by code."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(path: Path, lines: Sequence[Any]) -> Path:
    """Write ``lines``, text as it is and all else as JSON; gzipped if the name says so."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def words(text: str) -> int:
    """Count tokens as a task may: words, and each quotation mark."""
    return len(text.replace('"', ' " ').split())
