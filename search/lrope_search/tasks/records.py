"""Records of data files: JSON lines, plain or gzipped, cut into splits that share none."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lrope_gguf.errors import LropeError

from ..sample import SPLITS

_SHARES = (0.5, 0.2, 0.3)  # of a file's records, in the order of SPLITS

T = TypeVar("T")


def read_records(path: Path | str, kind: str, parse: Callable[[str, Any], T]) -> list[T]:
    """Return what ``parse`` makes of every line that is not blank.

    Raises `LropeError`: the file cannot be read, holds no records, or a line is no record; names the line.

    Args:
        path: JSONL file, gzipped or not, UTF-8.
        kind: What a record is, for messages: ``key-value record``.
        parse: Takes where the line stands (``FILE:LINE``) and its JSON value. Its `LropeError`s pass through;
            the errors of a value of another shape (`ValueError`, `TypeError`, `KeyError`) become one.
    """
    records = []
    try:
        with Path(path).open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig") as lines:
            for n, line in enumerate(lines, 1):
                if line.strip():
                    records.append(_parsed(f"{path}:{n}", line, kind, parse))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise LropeError(f"{path}: cannot read {kind}s ({reason}); give a JSONL file") from error
    if not records:
        raise LropeError(f"{path}: has no records; give a JSONL file of {kind}s")
    return records


def _parsed(where: str, line: str, kind: str, parse: Callable[[str, Any], T]) -> T:
    try:
        value = json.loads(line)
        if "\\ud" in line.lower():  # half of a surrogate pair is legal JSON, but no text that could be tokenized
            json.dumps(value, ensure_ascii=False).encode()
        return parse(where, value)
    except KeyError as error:
        raise LropeError(f"{where}: not a {kind} (it has no {error})") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise LropeError(f"{where}: not a {kind} ({error})") from error


def split_groups(groups: Sequence[Sequence[T]], seed: int, data: object) -> dict[str, list[T]]:
    """Return the members of ``groups`` by split, shuffled by ``seed``; no group stands in two splits.

    The splits get their shares of the members as nearly as whole groups allow, and one group at the least. Raises
    `LropeError`: there are fewer groups than splits; names ``data``.
    """
    if len(groups) < len(SPLITS):
        raise LropeError(
            f"{data}: has only {len(groups)} contexts that share no text; search, validation and test need one each; "
            "give more data"
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    sizes = np.array([len(groups[i]) for i in order])
    middles = np.cumsum(sizes) - sizes / 2.0
    cuts = np.searchsorted(middles, np.cumsum(_SHARES)[:-1] * sizes.sum())
    first = min(max(int(cuts[0]), 1), len(groups) - 2)  # of few groups, a share may round to none
    cuts = np.array([first, min(max(int(cuts[1]), first + 1), len(groups) - 1)])
    parts = np.split(order, cuts)
    return {split: [member for i in part for member in groups[i]] for split, part in zip(SPLITS, parts, strict=True)}


def too_few(data: object, split: str, index: int, sizes: dict[str, int], what: str = "contexts") -> LropeError:
    """Return the error of a split that has no context ``index``; ``sizes``: the contexts that each split has."""
    return LropeError(
        f"{data}: {index + 1} {split} contexts asked for, but of its {sum(sizes.values())} {what} {sizes[split]} are "
        f"for {split}; ask for fewer contexts or give more data"
    )
