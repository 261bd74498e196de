"""What a task is, and the parts that every task has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .answers import holds

SPLITS = ("search", "validation", "test")


@dataclass(frozen=True)
class Probe:
    """One question about a context; its answer stands at ``depth`` (0 first, 1 last).

    ``answer`` is what teacher forcing feeds; of a generated text, ``aliases`` are as right. ``normalized``: punctuation
    and articles do not count (`normalize`).
    """

    depth: float
    question: str
    answer: str
    aliases: tuple[str, ...] = ()
    normalized: bool = False

    def answered_by(self, text: str) -> bool:
        """Whether a generated ``text`` contains the answer, or an alias of it."""
        return holds(text, (self.answer, *self.aliases), normalized=self.normalized)


@dataclass(frozen=True)
class Context:
    """One long prompt prefix with its probes; ``split`` is ``search``, ``validation`` or ``test``.

    ``lead``, of a calibration context: what stands between a question and its answer unless a model shows that it
    writes something else.
    """

    split: str
    index: int
    prefix: str
    probes: tuple[Probe, ...]
    lead: str = ""


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
        """Return a short, easy context that shows how a model words its answers.

        Nothing in it stands in a validation or test context.
        """
        ...


def even_depths(n: int) -> list[float]:
    """Return ``n`` evenly spaced depths from 0 to 1; only 0 for one."""
    return [float(depth) for depth in np.linspace(0.0, 1.0, n)]
