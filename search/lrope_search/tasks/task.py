"""The interface of tasks, and the parts that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lrope_gguf.errors import LropeError

from ..sample import SPLITS
from .answers import holds, share

_SPAWN_KEY = 0x706C6163  # apart from the streams of contents and of optimizers with the same seed


@dataclass(frozen=True)
class Probe:
    """One question about a context; its answer stands at ``depth`` (0 first, 1 last).

    ``answer`` is what teacher forcing feeds; of a generated text, ``aliases`` are as right. ``normalized``: punctuation
    and articles do not count (`normalize`). ``references``: of a question with an answer of several parts, these parts;
    ``answer`` then has them all in their order.
    """

    depth: float
    question: str
    answer: str
    aliases: tuple[str, ...] = ()
    normalized: bool = False
    references: tuple[str, ...] = ()

    def share(self, text: str) -> float:
        """Return how much of the answer (an alias, all `references`) a generated ``text`` contains: 0 to 1."""
        if self.references:
            return share(text, self.references)
        return float(holds(text, (self.answer, *self.aliases), normalized=self.normalized))

    def answered_by(self, text: str) -> bool:
        """Whether a generated ``text`` contains all of the answer."""
        return self.share(text) == 1.0


@dataclass(frozen=True)
class Context:
    """One long prompt prefix with its probes; ``split`` is ``search``, ``validation`` or ``test``.

    ``lead``, of a calibration context: what stands between a question and its answer unless a model shows that it
    writes something else. ``n_places``: how many questions the context has room for; 0: no more than ``probes``.
    ``task``: the name of its task in a mix of several.
    """

    split: str
    index: int
    prefix: str
    probes: tuple[Probe, ...]
    lead: str = ""
    n_places: int = 0
    task: str = ""


class Task(Protocol):
    """A source of contexts; the same settings and seed always give the same ones."""

    @property
    def name(self) -> str:
        """Short name, as on the command line."""

    def size(self, split: str) -> int | None:
        """Return how many contexts ``split`` has, None if as many as wanted."""

    def context(self, split: str, index: int) -> Context:
        """Return context ``index`` (from 0) of ``split``; no context stands in two splits."""

    def calibration(self) -> Context:
        """Return a short, easy context, nothing of which is for validation or test, to see how a model answers."""


def check_probes(probes: int | None) -> None:
    """Refuse contexts without a probe; None is for the task to choose. Raises `LropeError`: fewer than one."""
    if probes is not None and probes < 1:
        raise LropeError(f"probes {probes}: a context needs a probe; ask for at least 1")


def places(split: str, index: int, n_places: int, n_probes: int, seed: int, positions: str) -> list[tuple[int, float]]:
    """Return where the probes of a context ask, first to last: places of ``range(n_places)``, each with its depth.

    ``jittered``: one place at random in each of ``n_probes`` equal strata, other ones in each context of each split.
    Whether a model finds an answer can depend on the very distance, so that the same few places in every context show
    that of these places alone. ``even``: evenly spaced from 0 to 1, the same everywhere. Raises `ValueError`: more
    probes than places.
    """
    if not 0 < n_probes <= n_places:
        raise ValueError(f"{n_probes} probes in {n_places} places")
    last = max(n_places - 1, 1)
    if positions == "even":
        return [(round(depth * (n_places - 1)), float(depth)) for depth in np.linspace(0.0, 1.0, n_probes)]
    split_number = SPLITS.index(split) if split in SPLITS else len(SPLITS)
    sequence = np.random.SeedSequence(seed, spawn_key=(_SPAWN_KEY, split_number, index))
    edges = np.arange(n_probes + 1) * n_places // n_probes
    chosen = np.random.default_rng(sequence).integers(edges[:-1], edges[1:])
    return [(place, place / last) for place in chosen.tolist()]
