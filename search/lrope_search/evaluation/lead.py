"""The lead: the words that a model writes before the value it is asked for.

``The value corresponding to the key "..." is "``, say. A value's log-probability means nothing where the model would
first say something else; so the base model is let write, once, and the words that it writes most often are fed.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..tasks.task import Probe

_KEY = "\0"  # in a lead: stands for what is particular to the question


@dataclass(frozen=True)
class Lead:
    """The words that a model writes before the value it is asked for."""

    template: str
    """A NUL stands for what is particular to the question, such as its key."""
    own_tokens: bool
    """Whether the value begins with a token of its own (not so: a blank and the value's first letters in one)."""

    def __str__(self) -> str:
        """Return it for people: ``{key}`` stands for what is particular to the question."""
        return self.for_key("{key}")

    def for_key(self, key: str) -> str:
        """Return the lead of the question about ``key``."""
        return self.template.replace(_KEY, key)


@dataclass(frozen=True)
class Frame:
    """The words that all questions begin and end with; what stands between them is particular to one.

    Attributes:
        head: Letters at the beginning.
        tail: Letters at the end.
    """

    head: int = 0
    tail: int = 0

    @classmethod
    def of(cls, questions: Sequence[str]) -> Frame:
        """Return the frame of ``questions``, in whole words: keys may begin alike."""
        head = re.sub(r"\w+$", "", _common_start(questions))
        tail = re.sub(r"\w+$", "", _common_start([question[::-1] for question in questions]))
        return cls(len(head), len(tail))

    def key(self, probe: Probe) -> str:
        """Return what is particular to the probe's question."""
        return probe.question[self.head : len(probe.question) - self.tail]


def most_frequent_lead(
    probes: Sequence[Probe], written: Sequence[list[int]], frame: Frame, text: Callable[[list[int]], str]
) -> Lead | None:
    """Return the lead that most of the ``written`` answers, in tokens, begin with; None if no half of them agree.

    Of free answers each may begin with words of its own, which would fit no other question. ``text`` turns tokens into
    text.
    """
    leads: Counter[Lead] = Counter()
    for probe, tokens in zip(probes, written, strict=True):
        answer = text(tokens)
        wordings = (probe.answer.lower(), *(alias.lower() for alias in probe.aliases))
        starts = [start for wording in wordings if (start := answer.lower().find(wording)) >= 0]
        if starts:
            lead = answer[: min(starts)]
            own = any(text(tokens[:n]) == lead for n in range(len(tokens)))
            key = frame.key(probe)
            leads[Lead(lead.replace(key, _KEY) if key else lead, own)] += 1
    return next((common for common, n in leads.most_common(1) if 2 * n >= leads.total()), None)


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    n = sum(itertools.takewhile(bool, (a == b for a, b in zip(first, last, strict=False))))
    return first[:n]
