"""Base of tasks that are generated from a seed and have answers of several parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import numpy as np

from lrope_gguf.errors import LropeError

from ..sample import SPLITS
from .sizing import TokenLimit
from .task import Context, Probe

_STREAM = 2  # apart from those of other tasks with the same seed
_N_SPLITS = len(SPLITS) + 1  # with the calibration
_MIXER = 2654435761  # Knuth's: 2 ** 32 by the golden ratio


class GeneratedTask(ABC):
    """Contexts of a size, or as large as fit."""

    name: ClassVar[str]
    unit: ClassVar[str]
    """What a size counts; the name of its setting, too."""
    least: ClassVar[int]
    """The smallest size for a question."""
    least_is: str
    """What the smallest context must hold, in words."""

    def __init__(self, size: int, least: int, *, most: int | None, seed: int, limit: TokenLimit | None) -> None:
        """Hold the size of contexts, in place of which ``limit`` may stand, and the smallest and largest there can be.

        Raises `LropeError`: a size that cannot be.
        """
        if limit is None and size < least:
            too_few = f"too few for {self.least_is}; ask for at least {least}"
            raise LropeError(f"{self.name}.{self.unit} {size}: {too_few}")
        if limit is None and most is not None and size > most:
            raise LropeError(f"{self.name}.{self.unit} {size}: there are only enough words for {most}; ask for fewer")
        self._size, self._least, self._most = size, least, most
        self._seed, self._limit = seed, limit
        self._fitted = cache(self._fitting)

    def size(self, split: str) -> int | None:
        """Return None: there are as many contexts as wanted."""
        return None

    def context(self, split: str, index: int) -> Context:
        """Return context ``index`` of ``split``. Raises `LropeError`: no size fits into the tokens allowed."""
        size = self._size if self._limit is None else self._fitted(self._limit, split, index)
        return self._make(split, index, size)

    @abstractmethod
    def calibration(self) -> Context:
        """Return a short, easy context."""

    @abstractmethod
    def _make(self, split: str, index: int, size: int) -> Context:
        """Return a context of ``size``; ``split`` may be ``calibration``."""

    def _fitting(self, limit: TokenLimit, split: str, index: int) -> int:
        """Return the size that fits."""

        def prompt(size: int) -> str:
            context = self._make(split, index, size)
            return context.prefix + context.probes[0].question

        most = max(min(limit.tokens, self._most or limit.tokens), self._least)  # a word has a token at the least
        return limit.fitting(
            *(prompt, self._least, most),
            lambda n_tokens: f"{self.least_is} takes {n_tokens} tokens already; ask for more",
            lambda n: f"there are words for {most} {self.unit}, which take only {n}; ask for fewer tokens",
        )

    def _generator(self, split: str, index: int) -> np.random.Generator:
        name = int.from_bytes(self.name.encode())
        key = (_STREAM, name, _split_number(split), index)
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))


def distinct(generator: np.random.Generator, split: str, n: int, below: int) -> list[int]:
    """Return ``n`` different numbers from 0 to ``below``, without, that no other split is given.

    Of each four numbers in a row a split has one, now this and now that, so that numbers look alike in all splits.
    Raises `ValueError`: there are not so many.
    """
    fours: list[int] = generator.choice(below // _N_SPLITS, n, replace=False).tolist()
    own = _split_number(split)
    return [_N_SPLITS * four + (own + (_MIXER * four >> 16)) % _N_SPLITS for four in fours]


def listing(depth: float, question: str, references: Sequence[str]) -> Probe:
    """Return a probe whose answer are all of ``references``, in their order."""
    return Probe(depth, question, ", ".join(references), references=tuple(references))


def _split_number(split: str) -> int:
    return SPLITS.index(split) if split in SPLITS else len(SPLITS)
