"""Which words occur most often? Common and frequent words extraction."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..settings import setting
from .generated import GeneratedTask, distinct, listing
from .settings import SizedTaskConfig
from .sizing import TokenLimit
from .task import Context
from .vocabulary import SYLLABLES

DEFAULT_WORDS = 1000
"""Of a context."""
_WORDS = len(SYLLABLES) ** 3  # of three syllables: none stands in another
_PER_SPLIT = _WORDS // 4
_DEPTH = 0.5  # the words asked for stand everywhere

_N_COMMON = 10
_TIMES = (30, 3)  # that a common and another word occurs
_FEW_TIMES = (6, 1)  # in lists too short for that
_SHORT = 1000  # words of such a list, less one
_EXAMPLE = (20, 3, 1)  # different words, times of a common and of another one
_COMMON_TASK = (
    "Below is a numbered list of words. Ten of them occur more often than all others. Name these ten words alone, "
    "separated by commas."
)
_COMMON_QUESTION = "Question: Which ten words occur most often in this list?\nAnswer:"

_DOTS = "..."
_ZETA = math.pi**2 / 6.0  # zeta(2): the sum of 1 / k²
_N_FREQUENT = 3
_FREQUENT_TASK = (
    "Below is a text in code. Count how often each code word occurs; dots are no word. Name the three most frequent "
    "words alone, the most frequent first, separated by commas."
)
_FREQUENT_QUESTION = "Question: Which three words occur most often in this text?\nAnswer:"


class WordsTask(GeneratedTask):
    """A task whose contexts are words made of the seed."""

    unit = "words"
    _most_words: ClassVar[int | None] = None

    def __init__(self, n_words: int | None = None, *, seed: int = 0, limit: TokenLimit | None = None) -> None:
        """Make contexts of ``n_words`` (None: 1000), or as many as fit. Raises `LropeError`: too few or too many."""
        n_words = DEFAULT_WORDS if n_words is None else n_words
        super().__init__(n_words, self.least, most=self._most_words, seed=seed, limit=limit)


class CommonWordsTask(WordsTask):
    """Common words extraction, ``cwe`` of RULER (Hsieh et al., arXiv 2404.06654, section 3), in words of our own.

    Of a shuffled, numbered list ten words occur 30 times each and all others 3 times; of a list of less than 1000 words
    6 times and once. All ten are asked for, in the order in which they first occur. Before the list stands a short one
    with its answer. Where RULER draws English words, these are three syllables each, ``badimo``, made of the seed.
    """

    name = "cwe"
    least_is = f"a list with {_N_COMMON} common words"
    least = _N_COMMON * _FEW_TIMES[0] + 1
    _most_words = _TIMES[1] * (_PER_SPLIT - _EXAMPLE[0] - _N_COMMON) + _TIMES[0] * _N_COMMON

    def calibration(self) -> Context:
        """Return a list of 70 words."""
        return self._make("calibration", 0, _N_COMMON * (_FEW_TIMES[0] + 1))

    def _make(self, split: str, index: int, size: int) -> Context:
        generator = self._generator(split, index)
        common, other = _FEW_TIMES if size < _SHORT else _TIMES
        n_others = -(-(size - common * _N_COMMON) // other)
        n_shown, *times = _EXAMPLE
        words = _words(generator, split, n_shown + _N_COMMON + n_others)
        shown, shown_answer = _list(generator, words[:n_shown], n_shown - _N_COMMON + times[0] * _N_COMMON, *times)
        listed, answer = _list(generator, words[n_shown:], size, common, other)
        prefix = f"{_COMMON_TASK}\n\n{shown}\n{_COMMON_QUESTION} {', '.join(shown_answer)}\n\n{listed}\n"
        return Context(split, index, prefix, (listing(_DEPTH, _COMMON_QUESTION, answer),), lead=" ")


class FrequentWordsTask(WordsTask):
    """Frequent words extraction, ``fwe`` of RULER (Hsieh et al., arXiv 2404.06654, section 3), in words of our own.

    Of a shuffled text of ``n`` words the ``k``-th most frequent occurs ``n / (zeta(2) k²)`` times, rounded down: a zeta
    distribution of exponent 2. The first are dots, which do not count; the next three are asked for. Where RULER draws
    six letters a word, these are three syllables, made of the seed.
    """

    name = "fwe"
    least_is = f"a text in which {_N_FREQUENT} words are the most frequent"
    least = math.ceil(_ZETA / ((_N_FREQUENT + 1) ** -2 - (_N_FREQUENT + 2) ** -2))
    """The third word must occur more often than the fourth."""

    def calibration(self) -> Context:
        """Return a text of 100 words."""
        return self._make("calibration", 0, 100)

    def _make(self, split: str, index: int, size: int) -> Context:
        generator = self._generator(split, index)
        n_ranks = math.isqrt(int(size / _ZETA))
        counts = [int(size / _ZETA / k**2) for k in range(2, n_ranks + 1)]
        words = _words(generator, split, len(counts))
        text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        text += [_DOTS] * (size - len(text))
        shuffled = " ".join(text[i] for i in generator.permutation(size))
        probe = listing(_DEPTH, _FREQUENT_QUESTION, words[:_N_FREQUENT])
        return Context(split, index, f"{_FREQUENT_TASK}\n\n{shuffled}\n\n", (probe,), lead=" ")


def _words(generator: np.random.Generator, split: str, n: int) -> list[str]:
    base = len(SYLLABLES)
    return [
        SYLLABLES[i // base**2] + SYLLABLES[i // base % base] + SYLLABLES[i % base]
        for i in distinct(generator, split, n, _WORDS)
    ]


def _list(
    generator: np.random.Generator, words: list[str], size: int, common: int, other: int
) -> tuple[str, list[str]]:
    """Return a numbered list of ``size`` words and those ten of them that are ``common`` times there, by their places.

    The last word of those that are there ``other`` times is there less often if ``size`` says so.
    """
    counts = [common] * _N_COMMON + [other] * (len(words) - _N_COMMON)
    every = [word for word, count in zip(words, counts, strict=True) for _ in range(count)][:size]
    every = [every[i] for i in generator.permutation(size)]
    first = Counter(every)  # in the order of first places
    wanted = set(words[:_N_COMMON])
    return " ".join(f"{n}. {word}" for n, word in enumerate(every, 1)), [word for word in first if word in wanted]


@dataclass(frozen=True, kw_only=True)
class CommonWordsConfig(SizedTaskConfig):
    """Settings of `CommonWordsTask`."""

    section = "cwe"
    summary = "common words, for eval --generate"
    size = "words"
    task: ClassVar[type[WordsTask]] = CommonWordsTask

    words: int | None = setting(None, "words per context", metavar="N", least=1, unset=str(DEFAULT_WORDS))


@dataclass(frozen=True, kw_only=True)
class FrequentWordsConfig(CommonWordsConfig):
    """Settings of `FrequentWordsTask`."""

    section = "fwe"
    summary = "frequent words, for eval --generate"
    task = FrequentWordsTask
