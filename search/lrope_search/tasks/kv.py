"""Key-value retrieval."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lrope_gguf.errors import LropeError

from ..sample import SPLITS, default_probes
from ..settings import setting
from .identifiers import DESCRIBED, IDENTIFIERS, Pairs, Wording
from .records import read_records, split_groups, too_few
from .settings import AS_NEEDED, POSITIONS, SizedTaskConfig, positions_setting, probes_setting
from .sizing import TokenLimit
from .task import Context, Probe, check_probes, places

_CALIBRATION = len(SPLITS)  # in place of a split's number: pairs that are part of none

DEFAULT_PAIRS = 40
"""Of a context, pairs of key and value."""


class KeyValueTask:
    """Key-value retrieval of "Lost in the Middle" (Liu et al., arXiv 2307.03172, section 3).

    A context is a JSON object of random UUIDs; the probes ask for the values of keys in all parts of it.
    Prompt and scoring are the benchmark's. For models too small to copy a UUID there are other kinds of keys and values
    (`IDENTIFIERS`).
    """

    name = "kv"
    kind = next(iter(IDENTIFIERS))
    """Of keys and values, if none is asked for."""
    least = 1
    wording: Wording | None = None
    """Of the prompt; None: that of the identifiers."""
    _stream: tuple[int, ...] = ()  # of random numbers, apart from those of other tasks

    def __init__(
        self,
        n_keys: int | None = None,
        *,
        probes: int | None = None,
        positions: str = POSITIONS[0],
        seed: int = 0,
        data: Path | str | None = None,
        identifiers: str | None = None,
        limit: TokenLimit | None = None,
    ) -> None:
        """Make contexts of ``n_keys`` pairs from ``seed``, or read them from ``data``; see `KeyValueConfig`.

        ``limit``, in place of ``n_keys``: as many pairs as fit. Raises `LropeError`: wrong numbers, a malformed file.
        """
        self._seed, self._n_probes, self._positions = seed, probes, positions
        self._data, self._limit = data, limit
        self._n_pairs = DEFAULT_PAIRS if n_keys is None else n_keys
        check_probes(probes)
        if probes and (n_keys is not None or (data is None and limit is None)) and self._n_pairs < probes:
            raise LropeError(f"--keys {self._n_pairs}: too few for {probes} probes; ask for at least {probes} keys")
        identifiers = identifiers or self.kind
        if identifiers not in IDENTIFIERS or (identifiers != self.kind and data is not None):
            raise LropeError(
                f"{self.name}.identifiers {identifiers}: give one of {', '.join(IDENTIFIERS)}, without --data"
            )
        self._identifiers = IDENTIFIERS[identifiers]
        self._wording = self.wording or self._identifiers.wording
        self._most = self._identifiers.most
        if data is None and self._most is not None and self._n_pairs > self._most:
            raise LropeError(f"--keys {self._n_pairs}: there are {self._most} such keys; ask for fewer")
        self._fitted = cache(self._fitting)
        self._splits: dict[str, list[Pairs]] | None = None
        if data is not None:
            records = read_records(data, "key-value record", lambda where, value: _pairs(where, value, n_keys))
            if min(map(len, records)) < (probes or 1):
                raise LropeError(
                    f"{data}: a record has fewer pairs than the {probes} probes; give fewer {self.name}.probes"
                )
            self._splits = split_groups([[record] for record in records], seed, data)

    def size(self, split: str) -> int | None:
        """Return how many contexts ``split`` has, None if as many as wanted."""
        return None if self._splits is None else len(self._splits[split])

    def context(self, split: str, index: int) -> Context:
        """Return context ``index`` of ``split``. Raises `LropeError`: the file has too few records, or no pairs fit."""
        if self._splits is not None and index >= len(self._splits[split]):
            sizes = {s: len(records) for s, records in self._splits.items()}
            raise too_few(self._data, split, index, sizes, "records")
        n_pairs = self._n_pairs if self._splits is None else len(self._splits[split][index])
        if self._limit is not None:
            n_pairs = self._fitted(self._limit, split, index)
        return self._make(split, index, self._pairs(split, index, n_pairs))

    def calibration(self) -> Context:
        """Return a context of four pairs, all asked for."""
        return self._make("calibration", 0, self._generate(_CALIBRATION, 0, 4), 4, "even")

    def _pairs(self, split: str, index: int, n_pairs: int) -> Pairs:
        if self._splits is None:
            return self._generate(SPLITS.index(split), index, n_pairs)
        return self._splits[split][index][:n_pairs]

    def _generate(self, split: int, index: int, n_pairs: int) -> Pairs:
        generator = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(*self._stream, split, index)))
        return self._identifiers.pairs(generator, n_pairs)

    def _fitting(self, limit: TokenLimit, split: str, index: int) -> int:
        """Return how many pairs fit."""

        def prompt(n_pairs: int) -> str:
            context = self._make(split, index, self._pairs(split, index, n_pairs))
            return context.prefix + context.probes[0].question

        if self._splits is None:
            most = min(limit.tokens, self._most or limit.tokens)  # a pair has a token at the least
        else:
            most = len(self._splits[split][index])
        least = self._n_probes or 1
        alone = "one pair alone takes" if self._n_probes is None else f"{least} pairs alone take"
        fewer = "" if self._n_probes is None else f" or fewer {self.name}.probes"
        what = "there are no more such keys" if self._splits is None else f"a record of {self._data} has no more"
        return limit.fitting(
            *(prompt, least, most),
            lambda n_tokens: f"{alone} {n_tokens}; ask for more tokens{fewer}",
            lambda n_tokens: f"{most} pairs take only {n_tokens}, and {what}; ask for fewer tokens",
        )

    def _make(self, split: str, index: int, pairs: Pairs, n_probes: int | None = None, positions: str = "") -> Context:
        n_probes = n_probes or self._n_probes or default_probes(len(pairs))
        where = places(split, index, len(pairs), n_probes, self._seed, positions or self._positions)
        wording, asked = self._wording, [(depth, *pairs[place]) for place, depth in where]
        probes = tuple(Probe(depth, wording.question(key), value) for depth, key, value in asked)
        return Context(split, index, wording.prefix(pairs), probes, lead=wording.lead, n_places=len(pairs))


class WordPairsTask(KeyValueTask):
    """`KeyValueTask` of words, beside which others may be asked."""

    name = "words"
    kind = "word"


class NumberPairsTask(KeyValueTask):
    """`KeyValueTask` of numbers, beside which others may be asked."""

    name = "numbers"
    kind = "number"


def _pairs(where: str, value: Any, n_pairs: int | None) -> Pairs:
    pairs = [(key, text) for key, text in value["ordered_kv_records"]]
    if not all(isinstance(text, str) and text for pair in pairs for text in pair):
        raise LropeError(f"{where}: a key or value is not text; give pairs of strings")
    if len({key for key, _ in pairs}) < len(pairs):
        raise LropeError(f"{where}: a key occurs twice, so that its value is ambiguous; keep one of them")
    if n_pairs is not None and len(pairs) < n_pairs:
        raise LropeError(f"{where}: has {len(pairs)} pairs, fewer than --keys {n_pairs}; ask for fewer keys")
    return pairs[:n_pairs]


def known_probes(probes: int | None, context_tokens: int | None, pairs: int | None) -> int | None:
    """Return the questions of a context; None where none are asked for, and file or tokenizer decide."""
    if probes is not None or context_tokens is not None or pairs is None:
        return probes
    return default_probes(pairs)


@dataclass(frozen=True, kw_only=True)
class PairsConfig(SizedTaskConfig):
    """Settings of all tasks of pairs that are made from the seed."""

    size = "keys"

    keys: int | None = setting(None, "pairs per context", metavar="N", least=1, unset=str(DEFAULT_PAIRS), option=True)
    probes: int | None = probes_setting("questions per context", AS_NEEDED)
    positions: str = positions_setting()

    def to_json(self) -> dict[str, Any]:
        """Return all that decides the questions."""
        return super().to_json() | {
            "probes": known_probes(self.probes, self.context_tokens, self.keys or DEFAULT_PAIRS)
        }


@dataclass(frozen=True, kw_only=True)
class WordPairsConfig(PairsConfig):
    """Settings of `WordPairsTask`."""

    section = "words"
    summary = "key-value retrieval of words"
    task = WordPairsTask


@dataclass(frozen=True, kw_only=True)
class NumberPairsConfig(PairsConfig):
    """Settings of `NumberPairsTask`."""

    section = "numbers"
    summary = "key-value retrieval of numbers"
    task = NumberPairsTask


@dataclass(frozen=True, kw_only=True)
class KeyValueConfig(SizedTaskConfig):
    """Settings of `KeyValueTask`."""

    section = "kv"
    summary = "key-value retrieval"
    size = "keys"
    task = KeyValueTask

    data: str | None = setting(
        None, "kv-retrieval-*_keys.jsonl[.gz] of the benchmark", metavar="FILE", unset="made from the seed", option=True
    )
    keys: int | None = setting(
        None, "pairs per context", metavar="N", least=1, unset=f"{DEFAULT_PAIRS}; with data all of a record",
        option=True,
    )  # fmt: skip
    identifiers: str | None = setting(
        None, f"what keys and values are, without data; {DESCRIBED}", choices=tuple(IDENTIFIERS),
        unset=next(iter(IDENTIFIERS)),
    )  # fmt: skip
    probes: int | None = probes_setting("questions per context", AS_NEEDED)
    positions: str = positions_setting()

    def to_json(self) -> dict[str, Any]:
        """Return all that decides the questions."""
        kind = None if self.data else self.identifiers or next(iter(IDENTIFIERS))
        pairs = self.keys or (DEFAULT_PAIRS if self.data is None else None)
        known = {"identifiers": kind, "probes": known_probes(self.probes, self.context_tokens, pairs)}
        return super().to_json() | known
