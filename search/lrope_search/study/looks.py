"""Which test contexts a verdict may use: each verdict of a study that is continued takes new ones."""

from __future__ import annotations

import json
from typing import Any

from lrope_gguf.errors import LropeError
from lrope_gguf.files import atomic_write_text

from ..results.findings import Look, looked_again
from .store import Study


class Looks:
    """The looks that a study has taken, by the number of candidates that each was taken after.

    The candidates are the same whenever the search is run again, so the same command finds its own look again and
    writes the same ``best.json``, and one that was killed before its verdict takes the look that it was about to take.
    ``looks.jsonl`` gets a line before a verdict is written; only then is a look spent.

    Args:
        study: where they are kept. One that has a verdict and no such file is older, and has taken one look.
        n_contexts: test contexts of a look.
        size: test contexts that there are; None: as many as wanted.
        confidence: of the first look's intervals.

    Raises:
        LropeError: the file is damaged.
    """

    def __init__(self, study: Study, n_contexts: int, size: int | None, confidence: float) -> None:
        self._path = study.directory / "looks.jsonl"
        self._n, self._size, self._confidence = n_contexts, size, confidence
        self._taken: dict[int, Look] = {}
        if self._path.exists():
            for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    record = json.loads(line)
                    self._taken[int(record["candidates"])] = Look.from_json(record)
                except (ValueError, TypeError, KeyError):
                    raise LropeError(
                        f"{self._path}: line {number} is damaged; choose another study directory"
                    ) from None
        elif (candidates := _judged(Study.kept(study.directory, "best"))) is not None:
            self._taken[candidates] = self.next()

    def next(self) -> Look:
        """Return the look that is taken where none was taken after as many candidates."""
        number = len(self._taken) + 1
        first = max((look.contexts.stop for look in self._taken.values()), default=0)
        new = self._size is None or first + self._n <= self._size
        contexts = range(first, first + self._n) if new else range(self._n)
        return Look(number, contexts, new, looked_again(self._confidence, number))

    def after(self, candidates: int) -> Look:
        """Return the look after so many ``candidates``, taken or not."""
        return self._taken.get(candidates) or self.next()

    def spend(self, candidates: int) -> None:
        """Note that a verdict is about to be written."""
        self._taken[candidates] = self.after(candidates)
        lines = (json.dumps({"candidates": n} | look.to_json()) for n, look in self._taken.items())
        atomic_write_text(self._path, "".join(f"{line}\n" for line in lines))


def _judged(best: Any) -> int | None:
    """Return after how many candidates the verdict in a study's ``best.json`` was written; None if there is none."""
    for name in ("provenance", "results"):
        best = best.get(name) if isinstance(best, dict) else None
    if not isinstance(best, dict) or not isinstance(best.get("verdict"), str):
        return None
    return best["candidates"] if isinstance(best.get("candidates"), int) else None
