"""Tasks: long contexts with questions at known depths. They know nothing of models."""

from __future__ import annotations

import gzip
import json
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lrope_gguf.errors import LropeError

from .types import Context, Probe

SPLITS = ("search", "validation", "test")
DEFAULT_PAIRS = 40
_SHARES = (0.5, 0.2, 0.3)  # of a file's records, in the order of SPLITS
IDENTIFIERS = ("uuid", "number")
_N_NUMBERS = 9000  # of four digits
_CALIBRATION = len(SPLITS)  # contexts that show how a model words its answers; part of no split

Pairs = Sequence[tuple[str, str]]


class Task(Protocol):
    """A source of contexts; the same settings and seed always give the same ones."""

    @property
    def name(self) -> str:
        """Short name, as on the command line."""
        ...

    def size(self, split: str) -> int | None:
        """Return how many contexts ``split`` has, None if as many as wanted."""
        ...

    def context(self, split: str, index: int) -> Context:
        """Return context ``index`` (from 0) of ``split``; no context stands in two splits."""
        ...

    def calibration(self) -> Context:
        """Return a short, easy context of no split."""
        ...


class KeyValueTask:
    """Key-value retrieval of "Lost in the Middle" (Liu et al., arXiv 2307.03172, section 3).

    A context is a JSON object of random UUIDs; the probes ask for the values of the keys at evenly spaced
    depths. Prompt and scoring are the benchmark's. For models too small to copy a UUID, keys can be numbers of
    four digits and values of three.
    """

    name = "kv"

    def __init__(
        self,
        n_pairs: int | None = None,
        *,
        depths: int = 11,
        seed: int = 0,
        data: Path | str | None = None,
        identifiers: str = "uuid",
    ) -> None:
        """Make contexts of ``n_pairs`` pairs from ``seed``, or read them from ``data``.

        ``data`` is a ``kv-retrieval-*_keys.jsonl[.gz]`` file of the benchmark: the first ``n_pairs`` pairs of each
        record are used (None: all); ``seed`` shuffles the records before they are cut into splits.
        ``identifiers``: ``uuid`` or ``number``, of generated contexts. Raises `LropeError` for wrong numbers and
        malformed files.
        """
        self._seed = seed
        self._depths = depths
        self._data = data
        self._numbers = identifiers == "number"
        self._n_pairs = DEFAULT_PAIRS if n_pairs is None else n_pairs
        if depths < 1:
            raise LropeError(f"--depths {depths}: a context needs a probe; ask for at least 1")
        if (n_pairs is not None or data is None) and self._n_pairs < depths:
            raise LropeError(f"--keys {self._n_pairs}: too few for {depths} depths; ask for at least {depths} keys")
        if identifiers not in IDENTIFIERS or (self._numbers and data is not None):
            raise LropeError(f"--identifiers {identifiers}: give uuid, or number without --data")
        if self._numbers and self._n_pairs > _N_NUMBERS:
            raise LropeError(f"--keys {self._n_pairs}: there are {_N_NUMBERS} keys of four digits; ask for fewer")
        self._splits: dict[str, list[Pairs]] | None = None
        if data is not None:
            records = _read_records(Path(data), n_pairs, depths)
            order = np.random.default_rng(seed).permutation(len(records))
            cuts = np.rint(np.cumsum(_SHARES)[:-1] * len(records)).astype(int)
            parts = np.split(order, cuts)
            self._splits = {s: [records[i] for i in part] for s, part in zip(SPLITS, parts, strict=True)}

    def size(self, split: str) -> int | None:
        """Return how many contexts ``split`` has, None if as many as wanted."""
        return None if self._splits is None else len(self._splits[split])

    def context(self, split: str, index: int) -> Context:
        """Return context ``index`` of ``split``; raises `LropeError` where the file has too few records."""
        if self._splits is None:
            return self._make(split, index, self._generate(SPLITS.index(split), index, self._n_pairs))
        records = self._splits[split]
        if index >= len(records):
            total = sum(map(len, self._splits.values()))
            raise LropeError(
                f"{self._data}: {index + 1} {split} contexts asked for, but of its {total} records {len(records)} are "
                f"for {split}; ask for fewer contexts or leave out --data"
            )
        return self._make(split, index, records[index])

    def calibration(self) -> Context:
        """Return a context of four pairs, all asked for."""
        return self._make("calibration", 0, self._generate(_CALIBRATION, 0, 4), depths=4)

    def _generate(self, split: int, index: int, n_pairs: int) -> Pairs:
        generator = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(split, index)))
        if self._numbers:
            keys = generator.choice(_N_NUMBERS, n_pairs, replace=False) + 1000
            values = generator.integers(100, 1000, n_pairs)
            return [(str(key), str(value)) for key, value in zip(keys, values, strict=True)]
        data = generator.bytes(32 * n_pairs)
        ids = [str(uuid.UUID(bytes=data[i : i + 16], version=4)) for i in range(0, len(data), 16)]
        return list(zip(ids[::2], ids[1::2], strict=True))

    def _make(self, split: str, index: int, pairs: Pairs, depths: int | None = None) -> Context:
        where = np.linspace(0.0, 1.0, depths or self._depths).tolist()
        asked = [(depth, *pairs[round(depth * (len(pairs) - 1))]) for depth in where]
        return Context(
            split=split,
            index=index,
            prefix=_prefix(pairs),
            probes=tuple(Probe(depth, f'Key: "{key}"\nCorresponding value:', value) for depth, key, value in asked),
        )


def _prefix(pairs: Pairs) -> str:
    records = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
    task = "Extract the value corresponding to the specified key in the JSON object below."
    return f"{task}\n\nJSON data:\n{{{records}}}\n\n"


def _read_records(path: Path, n_pairs: int | None, depths: int) -> list[Pairs]:
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8") as lines:
            records = [_read_record(f"{path}:{n}", line, n_pairs) for n, line in enumerate(lines, 1) if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise LropeError(f"{path}: cannot read key-value records ({reason}); give a JSONL file") from error
    if not records:
        raise LropeError(f"{path}: holds no records; give a JSONL file of key-value records")
    if min(map(len, records)) < depths:
        raise LropeError(f"{path}: a record has fewer pairs than the {depths} depths; give a smaller --depths")
    return records


def _read_record(where: str, line: str, n_pairs: int | None) -> Pairs:
    try:
        pairs = [(key, value) for key, value in json.loads(line)["ordered_kv_records"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LropeError(f"{where}: not a key-value record ({error}); expected ordered_kv_records of pairs") from error
    if not all(isinstance(text, str) and text for pair in pairs for text in pair):
        raise LropeError(f"{where}: a key or value is no text; expected pairs of strings")
    if len({key for key, _ in pairs}) < len(pairs):
        raise LropeError(f"{where}: a key occurs twice; its value would be ambiguous")
    if n_pairs is not None and len(pairs) < n_pairs:
        raise LropeError(f"{where}: has {len(pairs)} pairs, fewer than --keys {n_pairs}; ask for fewer keys")
    return pairs[:n_pairs]
